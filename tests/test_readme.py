"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import torch

from cmdgpu.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_python_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    before = torch.get_rng_state()
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    torch.set_rng_state(before)
    assert (tmp_path / "final.safetensors").exists() and (tmp_path / "run.cmd.zarr").is_dir()


def test_it_names_the_commands_there_are_and_no_other() -> None:
    named = set(re.findall(r"`cmdgpu ([a-z]+)", README))
    assert named == set(cli.list_commands(click.Context(cli)))


def test_the_pages_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
