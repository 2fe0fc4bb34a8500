"""Record what a Hugging Face Trainer trains: ``callbacks=[cmdgpu.hf.CMDRecorder("run.zarr", every=100)]``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import nn

from cmdgpu.errors import CmdgpuError
from cmdgpu.logged import scalars
from cmdgpu.recording import Recorder
from cmdgpu.sharded import is_sharded_model

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        hint = "pip install transformers accelerate"
        raise CmdgpuError("cmdgpu.hf needs transformers", hint=hint) from error


class CMDRecorder(TrainerCallback):
    """A ``Recorder`` for the time of ``train``: one snapshot per optimizer step that ``every`` divides.

    A step is ``state.global_step``. The numbers that were logged since the snapshot before are recorded with
    it, the newest of each name. DDP and FSDP2 are recorded as ``Recorder`` says; FSDP1 and ZeRO are refused.
    Training that is resumed goes on in the same store; where it starts again before the last snapshot,
    UsageError says so before the first batch.

    The Trainer tells its callbacks nothing of an exception: ``close``, the next ``train`` or the end of the
    process then finish the snapshot in flight and let go of the store.

    ``recorder_options`` are those of ``Recorder``.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 1, **recorder_options: Any) -> None:
        self._path = path
        self._every = every
        self._options = recorder_options
        self._recorder: Recorder | None = None
        self._n_logs = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        self.close()
        self._recorder = Recorder(self._path, self._every, **self._options)
        self._n_logs = len(state.log_history)
        assert model is not None
        self._recorder.check(model, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if state.global_step % self._every:
            return  # before the model is looked at, which takes its state dict
        assert self._recorder is not None and model is not None
        if not state.is_world_process_zero and not is_sharded_model(model):
            return
        logged = {name: value for log in state.log_history[self._n_logs :] for name, value in log.items()}
        logged.pop("step", None)
        if self._recorder.record(model, state.global_step, **scalars(logged)):
            self._n_logs = len(state.log_history)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the snapshot in flight and let go of the store; a second call does nothing."""
        if self._recorder is not None:
            self._recorder.close()
