"""Record what Lightning trains: ``callbacks=[cmdgpu.lightning.CMDRecorder("run.zarr", every=100)]``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cmdgpu.errors import CmdgpuError
from cmdgpu.logged import scalars
from cmdgpu.recording import Recorder

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise CmdgpuError("cmdgpu.lightning needs Lightning", hint="pip install lightning") from error


class CMDRecorder(Callback):
    """A ``Recorder`` for the time of ``fit``: one snapshot per optimizer step that ``every`` divides.

    A step is ``trainer.global_step``: batches whose gradients are accumulated make one. The numbers in
    ``trainer.callback_metrics`` are recorded beside it (``train/loss`` as ``train_loss``). DDP and sharded
    strategies are recorded as ``Recorder`` says; FSDP1 is refused. Training that is resumed goes on in the
    same store; where it starts again before the last snapshot, UsageError says so before the first batch.
    An exception in training closes the store, and stays the one that is raised.

    ``recorder_options`` are those of ``Recorder``.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 1, **recorder_options: Any) -> None:
        self._path = path
        self._every = every
        self._options = recorder_options
        self._recorder: Recorder | None = None
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._recorder = Recorder(self._path, self._every, **self._options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        assert self._recorder is not None
        self._recorder.check(trainer.model or pl_module, self._last_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # its gradients are still being accumulated
        self._last_step = trainer.global_step
        if self._last_step % self._every:
            return  # before the metrics: those on the device would be waited for
        assert self._recorder is not None
        metrics = scalars(trainer.callback_metrics)
        self._recorder.record(trainer.model or pl_module, self._last_step, **metrics)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._recorder is not None:  # of a fit without a single batch, too, which has no end of training
            self._recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(type(exception), exception, exception.__traceback__)
