"""One function per figure, registered in ``FIGURES`` under its name.

Each returns a ``matplotlib.figure.Figure`` of its own: no pyplot, no backend chosen, no global settings
changed. ``figure.savefig(path)`` writes it. The numbers are those of ``cmdgpu.views``.
"""

from cmdgpu.plot.accuracy import accuracy_against_step
from cmdgpu.plot.correlation import correlation_matrix
from cmdgpu.plot.fits import error_against_modes
from cmdgpu.plot.histogram import correlation_histogram
from cmdgpu.plot.landscape import landscape
from cmdgpu.plot.methods import methods_against_step
from cmdgpu.plot.network import modes_through_network
from cmdgpu.plot.plane import trajectory_plane
from cmdgpu.plot.profiles import MAX_PANELS, reference_profiles
from cmdgpu.plot.scalars import scalars_against_step
from cmdgpu.plot.style import FIGURES, INK, STYLE, StyledFigure
from cmdgpu.plot.weights import sampled_weights

__all__ = [
    "FIGURES",
    "INK",
    "MAX_PANELS",
    "STYLE",
    "StyledFigure",
    "accuracy_against_step",
    "correlation_histogram",
    "correlation_matrix",
    "error_against_modes",
    "landscape",
    "methods_against_step",
    "modes_through_network",
    "reference_profiles",
    "sampled_weights",
    "scalars_against_step",
    "trajectory_plane",
]
