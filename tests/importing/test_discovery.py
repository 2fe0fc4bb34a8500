"""Laws of paths: what is a checkpoint, what lies beside one, and what should have been one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from cmdgpu.errors import CheckpointError, UsageError
from cmdgpu.importing import FORMATS
from cmdgpu.importing.discovery import Found, discover

STATE = {"w": torch.arange(3.0)}


def make(folder: Path, *names: str) -> Path:
    """Checkpoints, by suffix, and other files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(STATE, path)
        elif name.endswith((".pt", ".ckpt", ".bin", ".pth")):
            torch.save(STATE, path)
        elif name.endswith(".npz"):
            np.savez(path, w=np.arange(3.0))
        else:
            path.write_text("{}")
    return folder


def names(found: Found, folder: Path) -> list[tuple[str, str]]:
    return [(str(one.path.relative_to(folder)), one.label) for one in found.candidates]


def skipped(found: Found) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in found.skipped}


def test_a_folder_of_files_in_natural_order_and_what_is_beside_them(tmp_path: Path) -> None:
    make(tmp_path, "ep10.pt", "ep2.pt", "ep1.npz", "log.txt", "optimizer.pt", "events.out", ".hidden.pt")
    make(tmp_path, "²")  # a digit that is no number
    found = discover(tmp_path)
    assert names(found, tmp_path) == [(n, n) for n in ("ep1.npz", "ep2.pt", "ep10.pt")]
    assert skipped(found) == {
        "²": "is no checkpoint",
        "log.txt": "is no checkpoint",
        "events.out": "is no checkpoint",
        "optimizer.pt": "lies beside a model",
    }


def test_a_trainers_folder_is_its_checkpoints_and_not_the_model_beside_them(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors", "config.json")
    assert names(discover(tmp_path), tmp_path) == [(".", tmp_path.name)]
    make(tmp_path, "checkpoint-1000/model.safetensors", "checkpoint-200/model.safetensors", "runs/events")
    found = discover(tmp_path)
    assert names(found, tmp_path) == [(n, n) for n in ("checkpoint-200", "checkpoint-1000")]
    assert skipped(found)["model.safetensors"] == "lies beside the checkpoints"
    assert skipped(found)["runs"] == "holds no checkpoint"


def test_a_folder_around_one_checkpoint_gives_it_its_name(tmp_path: Path) -> None:
    make(tmp_path, "step_3/net.pt", "step_3/optimizer.pt", "step_20/net.pt", "step_20/args.json")
    assert names(discover(tmp_path), tmp_path) == [("step_3/net.pt", "step_3"), ("step_20/net.pt", "step_20")]
    make(tmp_path, "step_3/ema.pt")
    with pytest.raises(
        CheckpointError, match=r"step_3: holds 2 checkpoints: ema\.pt, net\.pt; name this folder .* by a glob"
    ):
        discover(tmp_path)


@pytest.mark.parametrize("as_text", [True, False])
def test_what_all_paths_end_in_tells_no_step(tmp_path: Path, as_text: bool) -> None:
    make(tmp_path, "step_3/model_0.pt", "step_20/model_0.pt")
    glob = str(tmp_path / "*" / "model_0.pt")
    paths: str | Iterable[Path] = glob if as_text else sorted(tmp_path.glob("*/model_0.pt"))
    found = discover(paths if isinstance(paths, str) else list(paths))
    assert sorted(one.label for one in found.candidates) == ["step_20", "step_3"]


def test_a_list_keeps_its_order_and_skips_what_a_shell_has_added(tmp_path: Path) -> None:
    make(tmp_path, "b.pt", "a.safetensors", "args.json")
    found = discover([tmp_path / "b.pt", tmp_path / "args.json", tmp_path / "a.safetensors"])
    assert [one.path.name for one in found.candidates] == ["b.pt", "a.safetensors"]
    assert skipped(found) == {"args.json": "is no checkpoint"}


def test_content_tells_the_format_and_no_suffix(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model_1.pt")
    (candidate,) = discover(tmp_path).candidates
    assert candidate.format is FORMATS["safetensors"]


def test_what_should_be_a_checkpoint_and_is_none_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "ep1.pt")
    (tmp_path / "ep2.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ep2\.npz: is empty"):
        discover(tmp_path)
    (tmp_path / "ep2.npz").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=r"ep2\.npz: is no "):
        discover(tmp_path)
    with pytest.raises(CheckpointError, match=r"log\.txt: is no checkpoint that can be read"):
        discover(make(tmp_path, "log.txt") / "log.txt")


def test_a_link_is_followed_only_where_a_person_named_it(tmp_path: Path) -> None:
    make(tmp_path, "runs/ep1.pt", "elsewhere/ep2.pt", "elsewhere/checkpoint-3/model.safetensors")
    for name, target in (("ep2.pt", "ep2.pt"), ("checkpoint-3", "checkpoint-3")):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "elsewhere" / target)
    (tmp_path / "runs" / "last.pt").symlink_to("ep1.pt")
    found = discover(tmp_path / "runs")
    assert names(found, tmp_path / "runs") == [("ep1.pt", "ep1.pt")]
    assert skipped(found)["last.pt"] == "is a symbolic link to ep1.pt: name it to take it"
    assert {"ep2.pt", "checkpoint-3"} < set(skipped(found))
    assert len(discover(str(tmp_path / "runs" / "ep*.pt")).candidates) == 2
    assert len(discover(tmp_path / "runs" / "checkpoint-3").candidates) == 1


def test_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent: there is nothing here"):
        discover(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"the glob .*\*\.pt matches nothing"):
        discover(str(tmp_path / "*.pt"))
    with pytest.raises(UsageError, match=r"there is no checkpoint at .*log\.txt: is no checkpoint"):
        discover(make(tmp_path, "log.txt"))
    with pytest.raises(UsageError, match="there is no checkpoint at no path"):
        discover([])
