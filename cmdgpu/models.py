"""The tensors of a PyTorch model, named once and told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from cmdgpu.errors import UnsupportedTensor, UsageError
from cmdgpu.store.parameter_map import FLOAT_DTYPES, Kind, ParameterMap, whole

Patterns: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class Choice:
    """Which tensors of a model are recorded."""

    include: tuple[re.Pattern[str], ...] = ()
    exclude: tuple[re.Pattern[str], ...] = ()
    buffers: bool = True
    trainable_only: bool = False

    def refusal(self, name: str, kind: Kind, tensor: Tensor) -> str | None:
        """Why a tensor is left out, or None."""
        if self.include and not any(p.search(name) for p in self.include):
            return "not included"
        if any(p.search(name) for p in self.exclude):
            return "excluded"
        if kind == "buffer" and not self.buffers:
            return "buffers are skipped"
        if kind == "parameter" and self.trainable_only and not tensor.requires_grad:
            return "does not require a gradient"
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return f"{dtype_name(tensor)} has no rows"
        return None


def compile_patterns(patterns: Patterns) -> tuple[re.Pattern[str], ...]:
    """Regular expressions that are searched for in names. Raises UsageError naming a broken one."""
    found: list[re.Pattern[str]] = []
    for pattern in [patterns] if isinstance(patterns, str) else (patterns or ()):
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from error
    return tuple(found)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = cast(nn.Module, model.module)
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def named_tensors(model: nn.Module) -> list[tuple[str, Kind, Tensor]]:
    """Every parameter, then every buffer that a state dict would hold; tied names appear each time.

    ``_orig_mod.`` of compiled sub-modules is dropped from the names. Raises UnsupportedTensor for a model
    whose parameters another library has cut into flat partitions.
    """
    model = unwrap(model)
    for name, parameter in model.named_parameters():  # first: the state dict of such a model gathers it
        _require_own_shape(name, parameter)
    kept = set(model.state_dict(keep_vars=True))
    found: list[tuple[str, Kind, Tensor]] = [
        (name, "parameter", p) for name, p in model.named_parameters(remove_duplicate=False)
    ]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in kept:
            found.append((name, "buffer", buffer))
    return [(name.replace("_orig_mod.", ""), kind, tensor) for name, kind, tensor in found]


def describe_model(model: nn.Module, choice: Choice) -> tuple[ParameterMap, list[Tensor]]:
    """The parameter map of a model and, in its order, the tensors.

    A sharded tensor (DTensor) has its whole shape here. Raises UnsupportedTensor by name for complex, meta
    and exotic float tensors and for partitions of FSDP1 and ZeRO, UsageError when nothing is left to record.
    """
    described: list[tuple[str, Kind, str, tuple[int, ...]]] = []
    tensors: list[Tensor] = []
    seen: dict[int, str] = {}
    aliases: dict[str, str] = {}
    skipped: list[tuple[str, str]] = []
    for name, kind, tensor in named_tensors(model):
        if reason := choice.refusal(name, kind, tensor):
            skipped.append((name, reason))
        elif id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
        else:
            _require_supported(name, tensor)
            seen[id(tensor)] = name
            described.append((name, kind, dtype_name(tensor), tuple(tensor.shape)))
            tensors.append(tensor)
    parameter_map = ParameterMap(whole(described), aliases, (), tuple(skipped))
    if parameter_map.n_rows == 0:
        raise UsageError(
            f"nothing to record: the model holds {len(skipped)} tensors and all are left out or empty",
            hint="widen include, exclude, buffers or trainable_only",
        )
    return parameter_map, tensors


def _require_own_shape(name: str, parameter: Tensor) -> None:
    if getattr(parameter, "_fsdp_flattened", False):
        found = "a flat parameter of FSDP1"
    elif hasattr(parameter, "ds_id"):
        found = "a partition of DeepSpeed ZeRO"
    else:
        return
    raise UnsupportedTensor(
        f"{found} has lost its shape",
        tensor=name,
        hint="shard with fully_shard (FSDP2), or import the checkpoints of the run",
    )


def _require_supported(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        found, hint = "a tensor without data (device meta)", "materialise the model first"
    elif dtype_name(tensor) not in FLOAT_DTYPES:
        found = f"a tensor of {dtype_name(tensor)}"
        hint = "leave it out with exclude=, or hold real and imaginary part in two tensors"
        hint = hint if tensor.is_complex() else "leave it out with exclude="
    elif tensor.layout != torch.strided:
        found, hint = f"a tensor of layout {tensor.layout}", "leave it out with exclude="
    elif name.encode(errors="ignore").decode() != name:  # no file format could hold it
        found, hint = "a tensor with half a surrogate in its name", "rename it"
    else:
        return
    raise UnsupportedTensor(f"{found} cannot be recorded", tensor=name, hint=hint)
