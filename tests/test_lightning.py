"""Laws of recording from Lightning: its Trainer really trains, and every snapshot is what the model held."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cmdgpu as cg
from cmdgpu.errors import CmdgpuError, ModelMismatch, StoreLocked, UsageError
from tests.verbs import check_same_bits, float_tensors

pytestmark = [
    # where there are many cores, Lightning advises more workers for a loader of sixteen samples
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # torch's own deprecation of what Lightning calls to find the number of leaves of a batch
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
]


class Model(L.LightningModule):
    """Linear regression with a BatchNorm, which remembers what it was after every batch."""

    def __init__(self, width: int = 4, fails_at: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.was: dict[int, dict[str, Tensor]] = {}
        self._fails_at = fails_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self._fails_at:
            raise ArithmeticError("training went wrong")
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.was.setdefault(self.global_step, {name: t.clone() for name, t in float_tensors(self).items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=2)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def check_recorded(path: Path, model: Model, steps: list[int]) -> None:
    traj = cg.Trajectory.open(path)
    assert traj.steps.tolist() == steps
    for step in steps:
        check_same_bits(traj.state_dict(step), model.was[step])
    assert traj.verify() == []


@pytest.mark.parametrize(("every", "kept"), [(1, list(range(1, 9))), (3, [3, 6])])
def test_every_snapshot_is_what_the_model_held(tmp_path: Path, every: int, kept: list[int]) -> None:
    path, model = tmp_path / "run.zarr", Model()
    trainer(cg.lightning.CMDRecorder(path, every)).fit(model, batches())
    check_recorded(path, model, kept)
    assert sorted(model.was) == list(range(1, 9))


def test_what_was_logged_lies_beside_the_steps(tmp_path: Path) -> None:
    path, losses = tmp_path / "run.zarr", list[float]()

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer(Keep(), cg.lightning.CMDRecorder(path)).fit(Model(), batches())
    scalars = cg.Trajectory.open(path).scalars
    assert scalars["train_loss"].tolist() == losses


def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", Model()
    trainer(cg.lightning.CMDRecorder(path), accumulate_grad_batches=4).fit(model, batches())
    check_recorded(path, model, [1, 2])


def test_resumed_training_goes_on_in_the_same_store(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", Model()
    first = trainer(cg.lightning.CMDRecorder(path))
    first.fit(model, batches())
    first.save_checkpoint(tmp_path / "end.ckpt")
    again = Model()
    trainer(cg.lightning.CMDRecorder(path), max_epochs=2).fit(
        again, batches(), ckpt_path=str(tmp_path / "end.ckpt")
    )
    again.was |= model.was
    check_recorded(path, again, list(range(1, 17)))


def test_training_that_does_not_go_on_is_refused_before_its_first_batch(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", Model()
    trainer(cg.lightning.CMDRecorder(path, every=2)).fit(model, batches())
    again, other = Model(), Model(width=5)
    with pytest.raises(UsageError, match="up to step 8, and training goes on from step 0; record"):
        trainer(cg.lightning.CMDRecorder(path)).fit(again, batches())
    check_recorded(path, model, [2, 4, 6, 8])
    with cg.Recorder(tmp_path / "begun.zarr") as recorder:
        recorder.record(again, 0)
    with pytest.raises(ModelMismatch, match=r"net\.0\.weight"):
        trainer(cg.lightning.CMDRecorder(tmp_path / "begun.zarr")).fit(other, batches())
    assert again.was == other.was == {}


def test_an_exception_closes_the_store_and_stays_the_news(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", Model(fails_at=5)
    with pytest.raises(ArithmeticError, match="training went wrong"):
        trainer(cg.lightning.CMDRecorder(path)).fit(model, batches())
    check_recorded(path, model, [1, 2, 3, 4, 5])
    cg.Recorder(path).close()  # nobody holds the lock


def test_a_fit_without_a_batch_lets_go_of_the_store(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", Model()
    trainer(cg.lightning.CMDRecorder(path)).fit(model, batches())
    trainer(cg.lightning.CMDRecorder(path), max_epochs=0).fit(Model(), batches())
    cg.Recorder(path).close()


def test_metrics_are_asked_for_only_when_a_snapshot_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def scalars(metrics: object) -> dict[str, float]:
        asked.append(metrics)
        return {}

    monkeypatch.setattr(cg.lightning, "scalars", scalars)
    trainer(cg.lightning.CMDRecorder(tmp_path / "run.zarr", every=4)).fit(Model(), batches())
    assert len(asked) == 2


def test_the_store_is_held_while_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"

    class Intrude(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == 2:
                with pytest.raises(StoreLocked):
                    cg.Recorder(path)

    trainer(cg.lightning.CMDRecorder(path), Intrude()).fit(Model(), batches())


def test_without_lightning_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cg.lightning  # is there
    monkeypatch.delitem(sys.modules, "cmdgpu.lightning")
    monkeypatch.delattr(cg, "lightning")
    found = builtins.__import__

    def absent(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CmdgpuError, match="needs Lightning; pip install lightning"):
        _ = cg.lightning
