"""Laws of recording from a Hugging Face Trainer: it really trains, every snapshot is what the model held."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import cmdgpu as cg
from cmdgpu.errors import CmdgpuError, UsageError
from cmdgpu.logged import scalars
from tests.verbs import check_same_bits, float_tensors


class Remember(TrainerCallback):
    """What the model was after every optimizer step, told before anybody else."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.was: dict[int, dict[str, Tensor]] = {}
        self.logs: list[dict[str, float]] = []
        self._fails_at = fails_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._fails_at:
            raise ArithmeticError("training went wrong")
        self.was[state.global_step] = {n: t.clone() for n, t in float_tensors(kwargs["model"]).items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(index, index + 6) % 16
        return {"input_ids": tokens, "labels": tokens}


def tiny() -> GPT2LMHeadModel:
    """A language model whose head is tied to its embedding."""
    shape: Any = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def trainer(folder: Path, model: PreTrainedModel, *callbacks: TrainerCallback, **options: Any) -> Any:
    quiet: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 2,
    }
    arguments = TrainingArguments(output_dir=str(folder / "hf"), **{**quiet, **options})
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=list(callbacks))


def check_recorded(path: Path, was: dict[int, dict[str, Tensor]], steps: list[int]) -> None:
    traj = cg.Trajectory.open(path)
    assert traj.steps.tolist() == steps
    for step in steps:
        check_same_bits(traj.state_dict(step), was[step])
    assert traj.verify() == []


@pytest.mark.parametrize(("every", "kept"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4])])
def test_every_snapshot_is_what_the_model_held(tmp_path: Path, every: int, kept: list[int]) -> None:
    path, remember = tmp_path / "run.zarr", Remember()
    trainer(tmp_path, tiny(), remember, cg.hf.CMDRecorder(path, every)).train()
    check_recorded(path, remember.was, kept)
    assert cg.Trajectory.open(path).parameters.aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    path, remember = tmp_path / "run.zarr", Remember()
    options = {"gradient_accumulation_steps": 4, "max_steps": 2}
    trainer(tmp_path, tiny(), remember, cg.hf.CMDRecorder(path), **options).train()
    check_recorded(path, remember.was, [1, 2])


def test_a_log_lies_beside_the_snapshot_after_it_and_only_there(tmp_path: Path) -> None:
    path, remember = tmp_path / "run.zarr", Remember()
    trainer(tmp_path, tiny(), remember, cg.hf.CMDRecorder(path)).train()
    losses = [log["loss"] for log in remember.logs if "loss" in log]  # logged after steps 2, 4 and 6
    expected = [np.nan, np.nan, losses[0], np.nan, losses[1], np.nan]
    recorded = cg.Trajectory.open(path).scalars
    assert np.array_equal(recorded["loss"], expected, equal_nan=True)
    assert {"learning_rate", "grad_norm", "epoch"} <= set(recorded)


def test_resumed_training_goes_on_in_the_same_store(tmp_path: Path) -> None:
    path, remember = tmp_path / "run.zarr", Remember()
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, tiny(), remember, cg.hf.CMDRecorder(path), max_steps=3, **options).train()
    recorder = cg.hf.CMDRecorder(path)
    trainer(tmp_path, tiny(), remember, recorder, **options).train(resume_from_checkpoint=True)
    check_recorded(path, remember.was, [1, 2, 3, 4, 5, 6])


def test_training_that_does_not_go_on_is_refused_before_its_first_batch(tmp_path: Path) -> None:
    path, remember, again = tmp_path / "run.zarr", Remember(), Remember()
    trainer(tmp_path, tiny(), remember, cg.hf.CMDRecorder(path)).train()
    with pytest.raises(UsageError, match="up to step 6, and training goes on from step 0; record"):
        trainer(tmp_path, tiny(), again, cg.hf.CMDRecorder(path)).train()
    assert again.was == {}
    check_recorded(path, remember.was, [1, 2, 3, 4, 5, 6])


def test_an_exception_stays_the_news_and_the_store_can_be_closed(tmp_path: Path) -> None:
    path, remember = tmp_path / "run.zarr", Remember(fails_at=4)
    recorder = cg.hf.CMDRecorder(path)
    with pytest.raises(ArithmeticError, match="training went wrong"):
        trainer(tmp_path, tiny(), remember, recorder).train()
    recorder.close()
    check_recorded(path, remember.was, [1, 2, 3])
    cg.Recorder(path).close()  # nobody holds the lock


def test_without_transformers_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cg.hf  # is there
    monkeypatch.delitem(sys.modules, "cmdgpu.hf")
    monkeypatch.delattr(cg, "hf")
    found = builtins.__import__

    def absent(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CmdgpuError, match="needs transformers; pip install transformers accelerate"):
        _ = cg.hf


@pytest.mark.parametrize(
    ("logged", "recorded"),
    [
        ({"train/loss": 1.5, "acc@1": 2}, {"train_loss": 1.5, "acc_1": 2.0}),
        ({"step": 1, "weights": 2.0}, {"step_": 1.0, "weights_": 2.0}),
        ({"a/b": 1.0, "a.b": 2.0, "a_b": 3.0}, {"a_b": 1.0, "a_b_2": 2.0, "a_b_3": 3.0}),
        ({"5-fold": 1.0, "": 2.0}, {"_5_fold": 1.0, "_": 2.0}),
        ({"l": torch.tensor(2.0), "n": np.float32(3), "m": np.array([4])}, {"l": 2.0, "n": 3.0, "m": 4.0}),
        ({"text": "x", "none": None, "yes": True, "v": torch.ones(2), "z": 1j, "w": torch.tensor(1j)}, {}),
        ({"x" * 90: 1.0, "x" * 91: 2.0}, {"x" * 64: 1.0, "x" * 60 + "_2": 2.0}),
    ],
)
def test_numbers_of_a_log_get_names_that_a_series_can_have(
    logged: dict[str, object], recorded: dict[str, float]
) -> None:
    assert scalars(logged) == recorded
