"""Kernels of cmdgpu: a leaf package that needs numpy and torch, and uses triton where it is installed.

The contract of an operation
----------------------------
An operation is a folder. ``reference.py`` defines it in float64 NumPy; every other file is one implementation
of it, and the folder's ``IMPLEMENTATIONS`` lists them in order of preference. An implementation

* answers a ``Problem`` (layout, element type, T, M, device) with every reason why it cannot serve it, or with
  none; the first one without reasons runs, and ``NoKernelError`` lists all of them when there is no such one;
* agrees with the definition, applied to the *stored* values, within the tolerance it declares;
* gives a row the same bits whatever block, thread or resumed run it is computed in, on one class of device;
* writes every element of its outputs, and leaves the caller's torch settings as they were.

Importing this package configures nothing.

    fit = assign_and_fit(W_tb, R_mt)              # W_tb (T, B) float32 / float16 / bfloat16, R_mt (M, T)
    W_hat = fit.a * R[fit.mode] + fit.b           # where fit.mode >= 0
"""

from cmdgpu_kernels.assignment import (
    IMPLEMENTATIONS,
    ReferenceFit,
    RowFit,
    assign_and_fit,
    assign_and_fit_reference,
    choose,
    workspace_bytes,
)
from cmdgpu_kernels.assignment.from_files import can_fit_files, files_workspace_bytes, fit_files
from cmdgpu_kernels.class_sums import class_sums
from cmdgpu_kernels.dispatch import Implementation, NoKernelError, Problem
from cmdgpu_kernels.gram import Gram, gram_matrix, gram_matrix_reference
from cmdgpu_kernels.references import References, prepare_references

__all__ = [
    "assign_and_fit",
    "prepare_references",
    "class_sums",
    "can_fit_files",
    "fit_files",
    "files_workspace_bytes",
    "workspace_bytes",
    "References",
    "RowFit",
    "choose",
    "Problem",
    "Implementation",
    "NoKernelError",
    "IMPLEMENTATIONS",
    "assign_and_fit_reference",
    "ReferenceFit",
    "gram_matrix",
    "Gram",
    "gram_matrix_reference",
]
