"""A model that Lightning trains for a few steps, on the CPU, quietly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

_L: Any = lightning


class Module(_L.LightningModule):
    def __init__(self) -> None:
        _L.LightningModule.__init__(self)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters())


def train(folder: Path, steps: int) -> tuple[Path, dict[str, Tensor]]:
    """(the checkpoint that Lightning wrote, the state dict it was written of)"""
    module = Module()
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
    trainer = _L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    return path, cast(dict[str, Tensor], dict(cast(Any, module).state_dict()))
