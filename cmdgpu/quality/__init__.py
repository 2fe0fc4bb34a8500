"""Are these modes better than chance? A verdict from rows at hand, in words and numbers.

A high |corr| proves nothing by itself: among ten references every row finds one that it resembles. What is
measured here is measured again on rows that share nothing with each other (``cmdgpu.null_model``), with the
same number of rows, snapshots and modes, through the same pipeline.
"""

from cmdgpu.quality.at_hand import AtHand, Sampled, rows_at_hand
from cmdgpu.quality.held_out import HeldOut
from cmdgpu.quality.partitions import adjusted_rand
from cmdgpu.quality.verdict import ChanceShares, CorrelationBin, Quality, Verdict, View, assess

__all__ = [
    "AtHand",
    "ChanceShares",
    "CorrelationBin",
    "HeldOut",
    "Quality",
    "Sampled",
    "Verdict",
    "View",
    "adjusted_rand",
    "assess",
    "rows_at_hand",
]
