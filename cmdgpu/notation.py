"""The letters of the house, written once.

| letter | meaning |
|---|---|
| N | rows: scalar parameters of the model |
| T | snapshots: columns of the trajectory |
| M | modes |
| K | sampled rows |
| B | rows of a block in flight |

Arrays carry their axes as a suffix, in order: ``W_nt`` is (N, T), a block in flight is
time-major and says so: ``W_tb`` is (T, B); ``R_mt`` holds the reference profiles, ``mode_n``
the mode of every row.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I16: TypeAlias = NDArray[np.int16]
I64: TypeAlias = NDArray[np.int64]
U8: TypeAlias = NDArray[np.uint8]
BoolArray: TypeAlias = NDArray[np.bool_]
AnyArray: TypeAlias = NDArray[Any]

CONSTANT: Final = -1
"""Mode of a row that never moves: a = 0, b = its value."""
NON_FINITE: Final = -2
"""Mode of a row with a NaN or an infinity among the selected snapshots."""
NO_ROW: Final = -1
"""Row number of a reference that is none: a first component of the rows of its mode."""
UNWRITTEN: Final = -32768
"""Fill of ``mode`` on disk: a hole of the layout, or a unit not fitted yet."""
MAX_MODES: Final = 32767
"""Modes are int16 on disk."""
