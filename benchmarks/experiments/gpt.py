"""A small GPT that reads Shakespeare character by character.

``python -m benchmarks.experiments.gpt --seeds 0:3 --in DIR`` trains what is not trained yet. The text is
``tinyshakespeare.txt`` in the folder ``CMDGPU_DATA``; its last tenth is held out, the first half of that
validates and the second half tests. A snapshot is recorded every ``steps`` steps: an epoch of the tables.
"""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.analysis import Judging
from benchmarks.experiments.command import asked
from benchmarks.experiments.reduced import methods
from benchmarks.experiments.transformer import Block, require_heads
from cmdgpu.errors import UsageError

NAME = "gpt"
FILE = "tinyshakespeare.txt"
WINDOWS = 200
"""Of the validation text and of the test text that losses are measured on, evenly spread, always the same."""


@dataclass(frozen=True)
class Config:
    """Adam at a constant rate."""

    epochs: int = 60
    steps: int = 20
    batch: int = 24
    rate: float = 2e-3
    context: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4
    judged_every: int = 20


@dataclass(frozen=True)
class Text:
    """Three runs of characters, numbered by the alphabet of the whole text: (n,) int64."""

    train: Tensor
    validation: Tensor
    test: Tensor
    alphabet: str


def read_text() -> Text:
    """Nine tenths, a twentieth and a twentieth of the file. Raises UsageError where there is none."""
    folder = os.environ.get("CMDGPU_DATA")
    path = Path(folder or ".") / FILE
    if not path.exists():
        raise UsageError(
            f"no text: CMDGPU_DATA={folder or ''} has no {FILE}", hint="a folder with that file, of any text"
        )
    text = path.read_text()
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    every = torch.tensor([number[character] for character in text])
    n = len(every)
    return Text(every[: n * 9 // 10], every[n * 9 // 10 : n * 19 // 20], every[n * 19 // 20 :], alphabet)


class GPT(nn.Module):
    """Tokens and positions, causal blocks, a head (Radford et al., 2018)."""

    def __init__(self, characters: int, *, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        require_heads(width, heads)
        self.character = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """(n, tokens) characters, at most ``context`` each -> logits (n, tokens, characters) of the next."""
        x = self.character(text) + self.position[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class NextCharacter:
    """Cross-entropy of the next character, windows drawn at random from the training text."""

    config: Config
    text: Text

    @property
    def epochs(self) -> int:
        return self.config.epochs

    def model(self) -> nn.Module:
        config = self.config
        return GPT(
            len(self.text.alphabet),
            context=config.context,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
        )

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(model.parameters(), lr=self.config.rate)]

    def train_epoch(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], epoch: int
    ) -> Mapping[str, float]:
        del epoch
        (optimizer,) = optimizers
        model.train()
        total = 0.0
        for _ in range(self.config.steps):
            first = torch.randint(0, len(self.text.train) - self.config.context, (self.config.batch, 1))
            windows = self.text.train[first + torch.arange(self.config.context + 1)]
            optimizer.zero_grad()
            loss = loss_of(model, windows)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        return {"train_loss": total / self.config.steps}

    def judge(self, model: nn.Module) -> Mapping[str, float]:
        return {"val_loss": held_out_loss(model, self.text.validation, self.config.context)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {**self.judge(model), "test_loss": held_out_loss(model, self.text.test, self.config.context)}


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character, of (n, context + 1) all but the first of each."""
    logits: Tensor = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, context: int) -> float:
    """Nats per character over evenly spread windows. Raises UsageError for a text shorter than one."""
    if len(text) <= context:
        raise UsageError(f"{len(text)} characters held out, windows of {context + 1}", hint="give more text")
    model.eval()
    first = torch.linspace(0, len(text) - context - 1, WINDOWS, dtype=torch.float64).long()
    return float(loss_of(model, text[first[:, None] + torch.arange(context + 1)]))


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    mine = NextCharacter(ask.config, read_text())
    judging = Judging(mine.model, mine.evaluate, select=("min:val_loss",), score="test_loss")
    ask.carry_out(mine, judging, methods, "A small GPT, Shakespeare by characters")


if __name__ == "__main__":
    main()
