"""Where a result begins: in a folder or on an object store, for the first process and those that join."""

from __future__ import annotations

from collections.abc import Callable

from cmdgpu.errors import NotAStore, StoreCorrupt
from cmdgpu.results import stored
from cmdgpu.results.contract import Frame, ModeSet, Provenance, Refine, Result
from cmdgpu.results.head import read_head
from cmdgpu.results.remote import begin_remote, join_remote
from cmdgpu.results.stored import StoredWriter
from cmdgpu.store import format as fmt
from cmdgpu.store.places import Place, RemotePath


def begin_result(
    out: Place,
    frame: Frame,
    provenance: Provenance,
    make_modes: Callable[[], ModeSet],
    *,
    resume: bool,
    refine: Refine | None = None,
) -> StoredWriter | Result:
    """The writer of a fit that is to end up at ``out``; the result itself when it is there already.

    ``make_modes`` (sample and cluster) is called only when no unfinished fit of this fingerprint is found:
    its references are then taken from there, since a second clustering could split a near-tie differently.
    ``refine`` then makes the rounds of refinement that it lacks; each is kept when it is done.
    Raises StoreExists, naming the setting that differs, for another fit at ``out`` or unfinished beside it;
    ``resume=False`` throws unfinished ones away, never a finished one.
    """
    if isinstance(out, RemotePath):
        return begin_remote(out, frame, provenance, make_modes, resume=resume, refine=refine)
    return stored.begin_result(out, frame, provenance, make_modes, resume=resume, refine=refine)


def join_result(out: Place, partial: Place) -> StoredWriter | None:
    """The writer of a fit that another process began; None when it has ended there meanwhile."""
    if isinstance(out, RemotePath):
        return join_remote(out)
    assert not isinstance(partial, RemotePath)
    return StoredWriter.join(out, partial)


def is_taken(out: Place) -> bool:
    """Whether something lies at ``out`` that no fit goes on with: to be opened, or refused."""
    if not isinstance(out, RemotePath):
        return out.exists()
    if not (out / fmt.DOCUMENT).exists():
        return False
    try:
        return read_head(out)[1]["status"] == "complete"
    except (NotAStore, StoreCorrupt):
        return True
