"""A small StarGAN v2, every network decomposed by itself from one store (after the paper's Figs. 17-21).

``python -m benchmarks.experiments.gan --seeds 0:3 --in DIR`` trains what is not trained yet.

A stand-in at reduced size: the paper translates faces of CelebA-HQ. Here planes become frogs and frogs
planes, CIFAR-10 at 16 x 16. The mapping network makes a style of noise, the encoder of an image; the
generator gives the style to a source image. As in the paper the discriminator is not decomposed. Losses are
those of StarGAN v2 (Choi et al., 1912.01865); a step takes its styles of noise or of images, by a coin.

Nothing is downloaded for the scores: images are compared by the Frechet distance of their coordinates along
the leading principal components of the training images, not of what Inception sees in them.
"""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments import reduced
from benchmarks.experiments.analysis import FITTED, Judging, plain
from benchmarks.experiments.command import asked
from benchmarks.experiments.data import Images, Split, cifar10
from cmdgpu import CMD, Trajectory
from cmdgpu.comparison.methods import Fittable, method_of
from cmdgpu.notation import F64

NAME = "gan"
PLANE, FROG = 0, 6
DECOMPOSED = ("mapping", "generator", "encoder")
NOISE = 16
FEATURES = 32
"""Principal components of the training images that the Frechet distance looks at."""
JUDGED_SEED = 0
"""Of the noise that models are judged with, always the same."""


@dataclass(frozen=True)
class Config:
    """A snapshot is recorded every ``steps`` steps; ``judged`` images of a domain validate, as many test."""

    epochs: int = 60
    steps: int = 15
    batch: int = 16
    images: int = 4000
    rate: float = 1e-3
    width: int = 12
    style: int = 16
    judged: int = 400
    judged_every: int = 20


# ---- networks -------------------------------------------------------------------------------------------


def halved(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class OfDomain(nn.Module):
    """A linear layer for each of two domains, whose answer alone counts: (n, n_in), (n,) -> (n, n_out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.linear = nn.Linear(n_in, 2 * n_out)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        both = self.linear(x).view(-1, 2, self.n_out)
        return both[torch.arange(len(x)), domain]


class MappingNetwork(nn.Module):
    """Noise (n, 16) -> style of a domain."""

    def __init__(self, style: int, hidden: int = 64) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(NOISE, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.heads = OfDomain(hidden, style)

    def forward(self, z: Tensor, domain: Tensor) -> Tensor:
        return self.heads(self.shared(z), domain)


class OfImage(nn.Module):
    """An image (n, 3, 16, 16) -> ``n_out`` numbers of a domain: its style, or whether it is real."""

    def __init__(self, width: int, n_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.third = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.heads = OfDomain(4 * width * 4, n_out)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = halved(functional.leaky_relu(layer(x), 0.2))
        return self.heads(x.flatten(1), domain)


class AdaIN(nn.Module):
    """(1 + gamma(s)) (x - mean) / std + beta(s), mean and std over the pixels of a channel."""

    def __init__(self, style: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(style, 2 * width)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        gamma, beta = self.linear(s)[:, :, None, None].chunk(2, dim=1)
        return (1 + gamma) * functional.instance_norm(x) + beta


class Generator(nn.Module):
    """A source image in another style: down to 8 x 8, two blocks that take the style, and up again."""

    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.styled = nn.ModuleList(AdaIN(style, n) for n in (2 * width, 2 * width, width))
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.paint = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x = functional.leaky_relu(self.read(x), 0.2)
        x = self.down(halved(functional.instance_norm(x)))
        x = x + self.middle(functional.leaky_relu(self.styled[0](x, s), 0.2))
        x = self.up(doubled(functional.leaky_relu(self.styled[1](x, s), 0.2)))
        return torch.tanh(self.paint(functional.leaky_relu(self.styled[2](x, s), 0.2)))


class Networks(nn.Module):
    """All that is recorded, the discriminator too: a run that goes on needs it."""

    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.mapping = MappingNetwork(style)
        self.generator = Generator(width, style)
        self.encoder = OfImage(width, style)
        self.discriminator = OfImage(width, 1)


# ---- training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Images (n, 3, 16, 16) in [-1, 1] and their domains (n,): 0 planes, 1 frogs."""

    x: Tensor
    y: Tensor

    @staticmethod
    def of(split: Split, each: int | None = None) -> Pictures:
        """At half the resolution; with ``each`` the first that many of either domain."""
        x = halved(split.x.permute(0, 3, 1, 2).float() / 127.5 - 1)
        if each is None:
            return Pictures(x, split.y)
        chosen = torch.cat([torch.nonzero(split.y == domain)[:each, 0] for domain in (0, 1)])
        return Pictures(x[chosen], split.y[chosen])


@dataclass(frozen=True)
class Translation:
    """Two optimizers: of the discriminator, and of the three networks that make images."""

    config: Config
    train: Pictures
    validation: Pictures
    test: Pictures
    basis: F64
    """(pixels, 32) what distances look at: see ``components``."""

    @staticmethod
    def of(config: Config, images: Images) -> Translation:
        train = Pictures.of(images.train)
        validation, test = (Pictures.of(split, config.judged) for split in (images.validation, images.test))
        return Translation(config, train, validation, test, components(train.x))

    @property
    def epochs(self) -> int:
        return self.config.epochs

    def model(self) -> Networks:
        return Networks(self.config.width, self.config.style)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        assert isinstance(model, Networks)
        makers = [p for name in DECOMPOSED for p in model.get_submodule(name).parameters()]
        return [
            torch.optim.Adam(parameters, lr=self.config.rate, betas=(0.0, 0.99))
            for parameters in (list(model.discriminator.parameters()), makers)
        ]

    def train_epoch(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], epoch: int
    ) -> Mapping[str, float]:
        del epoch
        assert isinstance(model, Networks)
        of_discriminator, of_makers = optimizers
        model.train()
        d_total, g_total = 0.0, 0.0
        for _ in range(self.config.steps):
            x, y = self._drawn()
            target = torch.randint(0, 2, y.shape)
            styles = self._styles(model, target)
            of_discriminator.zero_grad()
            d_loss = discriminator_loss(model, x, y, target, styles[0].detach())
            d_loss.backward()
            of_discriminator.step()
            of_makers.zero_grad()
            g_loss = makers_loss(model, x, y, target, styles)
            g_loss.backward()
            of_makers.step()
            d_total += float(d_loss.detach())
            g_total += float(g_loss.detach())
        n = self.config.steps
        return {"discriminator_loss": d_total / n, "makers_loss": g_total / n}

    def _drawn(self) -> tuple[Tensor, Tensor]:
        which = torch.randint(0, len(self.train.y), (self.config.batch,))
        return self.train.x[which], self.train.y[which]

    def _styles(self, model: Networks, target: Tensor) -> tuple[Tensor, Tensor]:
        """Two styles of every target domain: of noise, or, by a coin, of training images."""
        if torch.rand(()) < 0.5:
            first, second = torch.randn(2, len(target), NOISE)
            return model.mapping(first, target), model.mapping(second, target)
        first, second = (model.encoder(self._references(target), target) for _ in range(2))
        return first, second

    def _references(self, domain: Tensor) -> Tensor:
        """A training image of every domain asked for, drawn at random."""
        planes, frogs = (torch.nonzero(self.train.y == each)[:, 0] for each in (0, 1))
        a_plane, a_frog = (each[torch.randint(0, len(each), domain.shape)] for each in (planes, frogs))
        return self.train.x[torch.where(domain == 0, a_plane, a_frog)]

    def judge(self, model: nn.Module) -> Mapping[str, float]:
        assert isinstance(model, Networks)
        return {"val_frechet": self._latent(model, self.validation)[0]}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Frechet distances of translated images, lower is better, and how much two styles differ."""
        assert isinstance(model, Networks)
        model.eval()
        frechet, diversity = self._latent(model, self.test)
        return {
            **self.judge(model),
            "test_frechet": frechet,
            "test_frechet_reference": self._by_reference(model, self.test),
            "test_diversity": diversity,
        }

    @torch.no_grad()
    def _latent(self, model: Networks, pictures: Pictures) -> tuple[float, float]:
        """Every image to the other domain by noise, twice: distance, and mean |difference| of the two."""
        model.eval()
        generator = torch.Generator().manual_seed(JUDGED_SEED)
        target = 1 - pictures.y
        first, second = (
            model.generator(pictures.x, model.mapping(z, target))
            for z in torch.randn(2, len(target), NOISE, generator=generator)
        )
        return self.distance(first, target, pictures), float((first - second).abs().mean())

    def _by_reference(self, model: Networks, pictures: Pictures) -> float:
        """Every image to the other domain by the style of an image there."""
        target = 1 - pictures.y
        references = torch.cat([pictures.x[pictures.y == 1], pictures.x[pictures.y == 0]])
        made = model.generator(pictures.x, model.encoder(references, target))
        return self.distance(made, target, pictures)

    def distance(self, made: Tensor, domain: Tensor, real: Pictures) -> float:
        """Mean over the domains of the Frechet distance between what was made for one and what is of it."""
        return float(
            np.mean(
                [
                    frechet(self._features(made[domain == each]), self._features(real.x[real.y == each]))
                    for each in (0, 1)
                ]
            )
        )

    def _features(self, x: Tensor) -> F64:
        """(n, 32): coordinates along the leading principal components of the training images."""
        return x.flatten(1).double().numpy() @ self.basis


def discriminator_loss(model: Networks, x: Tensor, y: Tensor, target: Tensor, s: Tensor) -> Tensor:
    """Non-saturating, with R1 on real images: softplus(-D(x)) + softplus(D(G(x, s))) + |grad D(x)|^2 / 2."""
    x = x.detach().requires_grad_()
    real = model.discriminator(x, y)
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    with torch.no_grad():
        made = model.generator(x, s)
    fake = model.discriminator(made, target)
    penalty = gradient.square().sum() / (2 * len(x))
    return functional.softplus(-real).mean() + functional.softplus(fake).mean() + penalty


def makers_loss(
    model: Networks, x: Tensor, y: Tensor, target: Tensor, styles: tuple[Tensor, Tensor]
) -> Tensor:
    """softplus(-D(x1)) + |s1 - E(x1)| - |x1 - x2| + |x - G(x1, E(x))| where xi = G(x, si)."""
    first, second = (model.generator(x, s) for s in styles)
    adversarial = functional.softplus(-model.discriminator(first, target)).mean()
    style = (styles[0] - model.encoder(first, target)).abs().mean()
    diverse = (first - second.detach()).abs().mean()
    cycle = (x - model.generator(first, model.encoder(x, y))).abs().mean()
    return adversarial + style - diverse + cycle


# ---- scores ---------------------------------------------------------------------------------------------


def components(x: Tensor) -> F64:
    """(pixels, 32) orthonormal: the directions in which images (n, ...) vary most."""
    pixels = x.flatten(1).double().numpy()
    _, vectors = np.linalg.eigh(np.cov(pixels, rowvar=False))
    return vectors[:, ::-1][:, :FEATURES]


def frechet(x: F64, y: F64) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2) of (n, d) and (m, d).

    The squared Wasserstein distance of the two Gaussians with these means and covariances; at least two rows
    each.
    """
    C_x, C_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(C_x)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ C_y @ root), 0)).sum()
    apart = x.mean(axis=0) - y.mean(axis=0)
    return max(float(apart @ apart + np.trace(C_x) + np.trace(C_y) - 2 * crossed), 0.0)


# ---- analysis -------------------------------------------------------------------------------------------


def methods(n_snapshots: int) -> dict[str, Fittable]:
    """The usual ones, and the paper's threshold: half of the largest distance, which is 1."""
    found = reduced.methods(n_snapshots)
    return {"GD": found.pop("GD"), "CMD t=0.5": CMD(threshold=0.5), **found}


def pattern(*modules: str) -> str:
    """Of the names of these networks' tensors."""
    return rf"^({'|'.join(modules)})\."


@dataclass(frozen=True)
class PerModule(Judging):
    """Every CMD is one of each network; the other methods treat all rows alike, and take them at once."""

    def of(
        self, traj: Trajectory, asked: Mapping[str, Fittable], steps: str, *, quality: bool = False
    ) -> dict[str, Any]:
        del quality
        makers = traj.sel(params=pattern(*DECOMPOSED))
        cmds = {label: method for label, method in asked.items() if isinstance(method, CMD)}
        others = {label: method for label, method in asked.items() if label not in cmds}
        found = super().of(makers, others, steps)
        with tempfile.TemporaryDirectory() as folder:
            for label, fits in fitted_per_module(traj, cmds, Path(folder)).items():
                found["methods"][label] = self._described(makers, fits, found["steps"])
        return {**found, "methods": {label: found["methods"][label] for label in asked}}

    def _described(self, traj: Trajectory, fits: Mapping[str, CMD], steps: Sequence[int]) -> dict[str, Any]:
        along: dict[str, list[float]] = {}
        for step in steps:
            for score, value in self._at(traj, fits, step).items():
                along.setdefault(score, []).append(value)
        errors = {key: along.pop(key) for key in ("weight_mse", "relative_error")}
        (key,) = (key.removeprefix("min:") for key in self.select)
        best = int(np.argmin(along[key]))
        at_best = {score: values[best] for score, values in along.items()}
        return {
            "stored_bytes": sum(method_of(cmd).stored_bytes for cmd in fits.values()),
            "fit": plain(fit_of(traj, fits)),
            "weight_mse_along": plain(errors["weight_mse"]),
            "relative_error_along": plain(errors["relative_error"]),
            "scores": {
                "none": {
                    "last": plain({score: values[-1] for score, values in along.items()}),
                    "selected": plain({"step": steps[best], **at_best}),
                    "along": plain(along),
                }
            },
        }

    @torch.no_grad()
    def _at(self, traj: Trajectory, fits: Mapping[str, CMD], step: int) -> dict[str, float]:
        """Scores of the model that the fits make together of a step, and how far its weights are."""
        model = self.build()
        for cmd in fits.values():
            cmd.load_into(model, step)
        rebuilt = model.state_dict()
        recorded = traj.state_dict(step)
        squared = sum(float((rebuilt[n].double() - w.double()).square().sum()) for n, w in recorded.items())
        energy = sum(float(w.double().square().sum()) for w in recorded.values())
        n = sum(w.numel() for w in recorded.values())
        scores = self.evaluate(model.eval())
        return {"weight_mse": squared / n, "relative_error": float(np.sqrt(squared / energy)), **scores}


def fitted_per_module(traj: Trajectory, asked: Mapping[str, CMD], out: Path) -> dict[str, dict[str, CMD]]:
    """By label and network, all of them in one pass over the store."""
    fits = {label: {name: copy.copy(cmd) for name in DECOMPOSED} for label, cmd in asked.items()}
    each = [(cmd, name) for of_label in fits.values() for name, cmd in of_label.items()]
    selected = {name: traj.sel(params=pattern(name)) for name in DECOMPOSED}
    CMD.fit_together(
        [cmd for cmd, _ in each],
        [selected[name] for _, name in each],
        [out / f"{i}.cmd.zarr" for i in range(len(each))],
    )
    return fits


def fit_of(traj: Trajectory, fits: Mapping[str, CMD]) -> dict[str, Any]:
    """Modes and errors of all networks together, and of each."""
    metrics = {name: cmd.metrics_ for name, cmd in fits.items()}
    rows = np.asarray(traj[:, :], dtype=np.float64)
    W = rows[np.isfinite(rows).all(axis=1)]
    n = {name: cmd.result.frame.map.n_rows_of("parameter") for name, cmd in fits.items()}
    mse = sum(n[name] * metrics[name]["weight_mse"] for name in fits) / sum(n.values())
    variance = float(np.square(W - W.mean(axis=1, keepdims=True)).mean())
    return {
        "n_modes": sum(cmd.n_modes_ for cmd in fits.values()),
        "weight_mse": mse,
        "r2_energy": 1 - mse / variance,
        "modules": {name: {key: found[key] for key in FITTED} for name, found in metrics.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    mine = Translation.of(ask.config, cifar10(ask.config.images, classes=(PLANE, FROG)))
    judging = PerModule(mine.model, mine.evaluate, select=("min:val_frechet",), score="test_frechet")
    scale = {
        "real_images_frechet": mine.distance(mine.validation.x, mine.validation.y, mine.test),
        "untranslated_frechet": mine.distance(mine.test.x, 1 - mine.test.y, mine.test),
    }
    ask.carry_out(mine, judging, methods, "A small StarGAN v2, planes and frogs", lambda _: plain(scale))


if __name__ == "__main__":
    main()
