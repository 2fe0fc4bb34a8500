"""Rounds of refinement of a fit that was begun: each is kept when it is done, and the last one settles it.

    references/c.0.0              those the fit began with, until it is settled
    references/round.<k>.partial  those that round k left
    zarr.json                     ``refinement``: the objective before and after every round;
                                  ``refining``: the digest of the last round's references, until it is settled

A round's references are durable before the head names them, the settled ones before the head vouches for
them, and no unit is computed before that. The head is replaced by one rename, or put: a fit killed anywhere
goes on after the last round that was named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cmdgpu.notation import F32
from cmdgpu.results.contract import Refine, Refined
from cmdgpu.results.head import read_head
from cmdgpu.results.modes import REFINING, read_modes, round_name
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import crc32c
from cmdgpu.store.places import Place

_ARRAY: Final = "references"


def unsettled(digests: Mapping[str, str]) -> dict[str, Any]:
    """What the head of a fit says before its first round."""
    return {"refinement": [], REFINING: digests[_ARRAY]}


def settle(place: Place, refine: Refine) -> None:
    """Do the rounds that an unfinished fit lacks; nothing where they are all done, by whatever process.

    Raises StoreCorrupt where what a round left is not what the head names.
    """
    _, head, frame = read_head(place)
    if REFINING not in head:
        return
    state = Refined(read_modes(place, head, frame.n_rows).references, tuple(head["refinement"]))
    digests: dict[str, str] = head["digests"]
    for after in refine(state):
        if _is_settled(place):
            return  # by another process at the same fit
        state = after
        _write(place, round_name(len(state.values) - 1), state.references)
        head.update({"refinement": list(state.values), REFINING: _digest(state.references)})
        _put_head(place, head)
    if _is_settled(place):
        return
    _write(place, fmt.chunk_name(0, 0), state.references)
    del head[REFINING]
    _put_head(place, {**head, "digests": {**digests, _ARRAY: _digest(state.references)}})
    for file in durable.entries(place / _ARRAY):
        if not file.name.startswith("round."):
            continue
        if isinstance(file, Path):
            durable.remove(file)
        else:
            file.client.delete(file.key)


def _is_settled(place: Place) -> bool:
    return REFINING not in read_head(place)[1]


def _digest(R_mt: F32) -> str:
    return fmt.sha256(R_mt.tobytes())


def _write(place: Place, name: str, R_mt: F32) -> None:
    if R_mt.size:
        durable.write_file(place / _ARRAY, name, [durable.bytes_of(R_mt), crc32c(R_mt)])
        durable.flush_directory(place / _ARRAY)


def _put_head(place: Place, head: dict[str, Any]) -> None:
    durable.write_file(place, fmt.DOCUMENT, [fmt.encode(fmt.group_document({"cmdgpu": head}))])
    durable.flush_directory(place)
