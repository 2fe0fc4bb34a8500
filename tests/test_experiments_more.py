"""The Vision Transformer, the GPT, the segmentation and the GAN run tiny, on images and a text made here.

What is true of every network, those of ``test_experiments`` among them, is here too.
"""

# torch and scipy leave the types of many functions open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg  # pyright: ignore[reportMissingTypeStubs]
import torch

from cmdgpu import CMD, Recorder, Trajectory
from cmdgpu.batch import Selection, fit_grid
from cmdgpu.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
TEXT = "To be, or not to be, that is the question:\n" * 60


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.syspath_prepend(str(ROOT))  # pyright: ignore[reportUnknownMemberType]


@pytest.fixture(autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    """200 training and 40 test images, dark planes and bright frogs, and a text."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 200), ("test", 40)):
        y = 6 * (np.arange(n, dtype=np.uint8) % 2)
        x = rng.integers(0, 100, (n, 32, 32, 3)) + 25 * y[:, None, None, None].astype(int)
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y}
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "cifar10.npz", **arrays)
    (folder / "tinyshakespeare.txt").write_text(TEXT)
    monkeypatch.setenv("CMDGPU_DATA", str(folder))


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # pyright: ignore[reportUnusedFunction]
    """Networks of this size wait for each other's threads longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether modes are better than chance takes seconds for each, and is looked at elsewhere."""
    from benchmarks.experiments.analysis import Judging

    of = Judging.of

    def quickly(self: Judging, traj: Any, asked: Any, steps: str, *, quality: bool = False) -> Any:
        del quality
        return of(self, traj, asked, steps)

    monkeypatch.setattr(Judging, "of", quickly)


TINY = {
    "simple_net": ("--images", "100", "--width", "2"),
    "resnet": ("--images", "100", "--width", "2"),
    "vit": ("--images", "40", "--width", "8", "--depth", "1", "--heads", "2", "--patch", "8"),
    "gpt": ("--steps", "2", "--batch", "4", "--context", "8", "--width", "8", "--depth", "1", "--heads", "2"),
    "segmentation": ("--images", "40", "--width", "3", "--judged", "10"),
    "gan": (
        "--images",
        "80",
        "--steps",
        "2",
        "--batch",
        "4",
        "--width",
        "2",
        "--style",
        "3",
        "--judged",
        "8",
    ),
}


def run(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """One experiment, as from the command line; its JSON, empty where nothing was analysed."""
    from importlib import import_module

    module: Any = import_module(f"benchmarks.experiments.{name}")
    module.main(["--in", str(folder), "--out", str(folder / "out"), *TINY[name], *flags])
    written = folder / "out" / f"{name}.json"
    return json.loads(written.read_text()) if written.exists() else {}


# ---- transformers ---------------------------------------------------------------------------------------


def test_vit_b_16_has_the_size_of_the_paper() -> None:
    from benchmarks.experiments.vit import VisionTransformer

    def size(depth: int) -> int:
        model = VisionTransformer(size=224, patch=16, width=768, depth=depth, heads=12)
        return sum(parameter.numel() for parameter in model.parameters())

    none, one = size(0), size(1)
    assert none + 12 * (one - none) == 85_806_346


def test_images_are_enlarged_to_what_the_patches_are_of() -> None:
    from benchmarks.experiments.vit import VisionTransformer

    model = VisionTransformer(size=64, patch=16, width=8, depth=1, heads=2)
    assert model.position.shape == (1, 17, 8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_softmax_of_the_products(causal: bool) -> None:
    from benchmarks.experiments.transformer import Block

    torch.manual_seed(0)
    block = Block(6, 2, causal=causal).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    got = block._attended(x)[0].detach().numpy()  # pyright: ignore[reportPrivateUsage]
    q, k, v = np.split(block.qkv(x)[0].detach().numpy(), 3, axis=1)
    for head in (slice(0, 3), slice(3, 6)):
        scores = q[:, head] @ k[:, head].T / math.sqrt(3)
        if causal:
            scores = np.where(np.tri(5) > 0, scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(got[:, head], weights @ v[:, head], rtol=1e-10, atol=1e-12)


def test_a_gpt_does_not_look_ahead() -> None:
    from benchmarks.experiments.gpt import GPT

    torch.manual_seed(0)
    model = GPT(7, context=6, width=8, depth=2, heads=2).eval()
    text = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = torch.tensor([[1, 2, 3, 0, 0, 0]])
    torch.testing.assert_close(model(text)[:, :3], model(other)[:, :3])
    assert not torch.allclose(model(text)[:, 3], model(other)[:, 3])


def test_what_does_not_divide_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a width of 8 for 3 heads"):
        run("gpt", tmp_path, "--heads", "3")
    with pytest.raises(UsageError, match="patches of 5 for images of 32"):
        run("vit", tmp_path, "--patch", "5")


def test_a_rate_falls_to_its_horizon_and_stays() -> None:
    from benchmarks.experiments.reduced import falling

    assert [falling(1.0, epoch, 4) for epoch in (1, 2, 3, 4, 5, 9)] == [1, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert falling(0.01, 3, 4, power=0.9) == pytest.approx(0.01 * 0.5**0.9)


# ---- text -----------------------------------------------------------------------------------------------


def test_the_last_tenth_of_the_text_is_held_out_once() -> None:
    from benchmarks.experiments.gpt import read_text

    text = read_text()
    parts = [text.train, text.validation, text.test]
    assert [len(part) for part in parts] == [len(TEXT) * 9 // 10, 129, 129]
    assert "".join(text.alphabet[int(i)] for i in torch.cat(parts)) == TEXT


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_alphabet() -> None:
    from benchmarks.experiments.gpt import GPT, held_out_loss, read_text

    text = read_text()
    model = GPT(len(text.alphabet), context=8, width=8, depth=1, heads=2)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    assert held_out_loss(model, text.test, 8) == pytest.approx(math.log(len(text.alphabet)), rel=1e-6)
    with pytest.raises(UsageError, match="8 characters held out, windows of 9"):
        held_out_loss(model, text.test[:8], 8)


def test_no_text_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.experiments.gpt import read_text

    monkeypatch.setenv("CMDGPU_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"has no tinyshakespeare\.txt"):
        read_text()


# ---- segmentation ---------------------------------------------------------------------------------------


def painted(colours: list[tuple[int, int, int]], n: int = 6) -> Any:
    """n images of vertical stripes, each image in another order; (stripe of every column)."""
    from benchmarks.experiments.data import Images, Split

    rng = np.random.default_rng(1)
    stripes = rng.integers(0, len(colours), (n, 32))
    x = (
        torch.from_numpy(np.array(colours, dtype=np.uint8)[stripes])[:, None]
        .expand(n, 32, 32, 3)
        .contiguous()
    )
    split = Split(x, torch.zeros(n, dtype=torch.int64))
    return Images(split, split, split, torch.zeros(3), torch.ones(3)), torch.from_numpy(stripes)


def test_labels_are_the_colours_greyest_first() -> None:
    from benchmarks.experiments.segmentation import colour_maps

    images, stripes = painted([(200, 30, 30), (90, 90, 90), (200, 200, 200), (30, 30, 200)])
    maps = colour_maps(images, 3)
    assert maps.centres.shape == (3, 2)
    assert np.all(np.diff(np.linalg.norm(maps.centres, axis=1)) > 0)
    x, label = maps.split(maps.test)
    # both greys are one class, whatever their brightness; red (chroma 152) is greyer than blue
    red = 0.299 * 200 + 0.701 * 30
    np.testing.assert_allclose(
        np.abs(maps.centres).max(axis=1), [0, 200 - red, 200 - 0.114 * 200 - 0.886 * 30], atol=1e-4
    )
    expected = torch.tensor([1, 0, 0, 2])[stripes][:, None].expand(6, 32, 32)
    assert torch.equal(label, expected)
    assert x.shape == (6, 1, 32, 32)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5) and float(x.std()) == pytest.approx(1, abs=1e-5)


def test_too_few_colours_are_refused() -> None:
    from benchmarks.experiments.segmentation import colour_maps

    with pytest.raises(UsageError, match="1 colours for 2 classes"):
        colour_maps(painted([(90, 90, 90)])[0], 2)


def test_pixels_of_the_padding_have_no_label() -> None:
    from benchmarks.experiments.data import augmented
    from benchmarks.experiments.segmentation import colour_maps

    images, _ = painted([(200, 30, 30), (90, 90, 90)])
    maps = colour_maps(images, 2)
    torch.manual_seed(0)
    part = augmented(maps.train)
    _, label = maps.split(part)
    assert torch.equal(label == -1, part[..., 0] == 0)
    assert bool((label == -1).any()) and not bool((maps.split(maps.train)[1] == -1).any())


def test_mean_iou_by_hand() -> None:
    from benchmarks.experiments.segmentation import mean_iou

    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert mean_iou(confusion) == pytest.approx((3 / 6 + 4 / 7) / 2), "the third class is nowhere"


def test_scores_count_every_pixel_once() -> None:
    from benchmarks.experiments.segmentation import colour_maps, scores_of

    images, stripes = painted([(200, 30, 30), (90, 90, 90)])
    maps = colour_maps(images, 2)

    class LeftIsGrey(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = (torch.arange(32) < 16).float().expand_as(x)
            return torch.cat([left, 1 - left], dim=1)

    found = scores_of(LeftIsGrey(), maps, maps.test, 2, "test")
    grey, left = (stripes == 1).numpy(), np.arange(32) < 16
    right = grey == left
    assert found["test_accuracy"] == pytest.approx(right.mean())
    both, either = [grey & left, ~grey & ~left], [grey | left, ~grey | ~left]
    assert found["test_miou"] == pytest.approx(
        np.mean([b.sum() / e.sum() for b, e in zip(both, either, strict=True)])
    )
    loss = np.where(right, math.log1p(math.exp(-1)), math.log1p(math.exp(1)))
    assert found["test_loss"] == pytest.approx(loss.mean(), rel=1e-5)


# ---- the GAN --------------------------------------------------------------------------------------------


def test_the_frechet_distance_is_that_of_gaussians() -> None:
    from benchmarks.experiments.gan import frechet

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((40, 4)) @ rng.standard_normal((4, 4)) + 1
    C_x, C_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(C_x @ C_y)))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(C_x + C_y - 2 * root)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet(x, x + 2.0) == pytest.approx(16)
    assert frechet(np.zeros((3, 4)), np.zeros((3, 4))) == 0.0


def test_features_are_the_leading_directions() -> None:
    from benchmarks.experiments.gan import components

    torch.manual_seed(0)
    scale = torch.linspace(1, 10, 48)
    basis = components(torch.randn(500, 48) * scale)
    np.testing.assert_allclose(basis.T @ basis, np.eye(32), atol=1e-10)
    assert np.abs(basis[:, 0]).argmax() > 40


def test_images_are_scored_against_those_of_the_domain_they_were_made_for() -> None:
    from benchmarks.experiments import gan
    from benchmarks.experiments.data import cifar10

    mine = gan.Translation.of(gan.Config(judged=8), cifar10(classes=(gan.PLANE, gan.FROG)))
    assert mine.test.x.shape == (16, 3, 16, 16) and mine.test.y.tolist() == [0] * 8 + [1] * 8
    assert float(mine.train.x.abs().max()) <= 1
    assert mine.distance(mine.test.x, mine.test.y, mine.test) == pytest.approx(0, abs=1e-8)
    assert mine.distance(mine.test.x, 1 - mine.test.y, mine.test) > 10


def test_each_optimizer_has_its_networks_and_a_step_moves_all_of_them() -> None:
    from benchmarks.experiments import gan
    from benchmarks.experiments.data import cifar10

    config = gan.Config(width=2, style=3, batch=4, steps=4, judged=8)
    mine = gan.Translation.of(config, cifar10(classes=(gan.PLANE, gan.FROG)))
    torch.manual_seed(0)
    model = mine.model()
    optimizers = mine.optimizers(model)
    held = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
    assert held[0] == {id(p) for p in model.discriminator.parameters()}
    assert held[0] | held[1] == {id(p) for p in model.parameters()} and not held[0] & held[1]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mine.train_epoch(model, optimizers, 1)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_r1_is_half_the_squared_gradient_on_real_images() -> None:
    from benchmarks.experiments import gan

    torch.manual_seed(0)
    model = gan.Networks(2, 3)
    torch.nn.init.normal_(model.discriminator.heads.linear.weight)
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    s = torch.randn(2, 3)
    image = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.discriminator(image, y).sum(), image)
    penalty = float(gradient.square().sum()) / 4
    real, fake = model.discriminator(x, y), model.discriminator(model.generator(x, s), 1 - y)
    expected = torch.log1p((-real).exp()).mean() + torch.log1p(fake.exp()).mean() + penalty
    torch.testing.assert_close(gan.discriminator_loss(model, x, y, 1 - y, s), expected, rtol=1e-5, atol=1e-6)


def test_a_fit_per_network_is_that_of_the_grid(tmp_path: Path) -> None:
    from benchmarks.experiments import gan

    run("gan", tmp_path, "--seeds", "0", "--epochs", "6", "--only", "train")
    store = tmp_path / "gan-0.zarr"
    traj = Trajectory.open(store)
    found = gan.fitted_per_module(traj, {"two": CMD(2), "half": CMD(threshold=0.5)}, tmp_path / "mine")
    grid = fit_grid(
        [store], tmp_path / "grid", n_modes=[2], per_module=True,
        selection=Selection(params=[gan.pattern(*gan.DECOMPOSED)]),
    )  # fmt: skip
    assert [fit.module for fit in grid] == list(gan.DECOMPOSED) == list(found["two"])
    for fit in grid:
        mine = found["two"][str(fit.module)]
        np.testing.assert_array_equal(mine.a_[:], fit.cmd.a_[:])
        np.testing.assert_array_equal(mine.references_, fit.cmd.references_)
    names = {t.name.split(".")[0] for cmd in found["half"].values() for t in cmd.result.frame.map.tensors}
    assert names == set(gan.DECOMPOSED)


def test_what_is_said_of_three_fits_is_true_of_their_weights(tmp_path: Path) -> None:
    from benchmarks.experiments import gan

    run("gan", tmp_path, "--seeds", "0", "--epochs", "6", "--only", "train")
    traj = Trajectory.open(tmp_path / "gan-0.zarr")
    makers = traj.sel(params=gan.pattern(*gan.DECOMPOSED))
    fits = gan.fitted_per_module(traj, {"two": CMD(2)}, tmp_path / "mine")["two"]
    recorded, rebuilt = (
        torch.stack(
            [
                torch.cat([w.flatten().double() for part in parts for w in part.state_dict(step).values()])
                for step in traj.steps.tolist()
            ],
            dim=1,
        )
        for parts in ([makers], list(fits.values()))
    )
    said = gan.fit_of(makers, fits)
    assert said["weight_mse"] == pytest.approx(float((recorded - rebuilt).square().mean()), rel=1e-4)
    moved = recorded - recorded.mean(dim=1, keepdim=True)
    expected = 1 - float((recorded - rebuilt).square().sum() / moved.square().sum())
    assert said["r2_energy"] == pytest.approx(expected, rel=1e-4)
    assert said["n_modes"] == 6 and set(said["modules"]) == set(gan.DECOMPOSED)


# ---- commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY))
def test_a_run_that_was_killed_goes_on_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("--seeds", "3", "--epochs", "3", "--only", "train")
    run(name, tmp_path / "whole", *train)

    record = Recorder.record

    def killed(self: Recorder, model: torch.nn.Module, step: int, **scalars: Any) -> bool:
        if step == 2:
            raise KeyboardInterrupt
        return record(self, model, step, **scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            run(name, tmp_path / "killed", *train)
    torch.rand(7)  # whatever the process did meanwhile
    run(name, tmp_path / "killed", *train)
    whole, went_on = (Trajectory.open(tmp_path / w / f"{name}-3.zarr") for w in ("whole", "killed"))
    assert went_on.steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(whole[:, :], went_on[:, :])
    assert not np.array_equal(whole[:, 0], whole[:, 3])
    for key, values in whole.scalars.items():
        np.testing.assert_array_equal(values, went_on.scalars[key])
    left = [file.name for file in (tmp_path / "killed").glob("*.pt")]
    assert left == [f"{name}-3.zarr.epoch-3.pt"]


@pytest.mark.usefixtures("no_verdicts")
@pytest.mark.parametrize(
    ("name", "claim"),
    [("vit", "Fig. 16"), ("gpt", "ransformers"), ("segmentation", "Fig. 8"), ("gan", "Fig. 21")],
)
def test_what_an_experiment_says_is_what_the_tables_need(name: str, claim: str, tmp_path: Path) -> None:
    from benchmarks import render

    found = run(name, tmp_path, "--seeds", "2:3", "--epochs", "12", "--judged-every", "4")
    page = "\n".join(render.experiments({name: found}))
    assert claim in page.splitlines()[2]
    assert "nan" not in page and "not finite" not in page
    assert found["steps"] == [[0, 4, 8, 12]]
    assert (tmp_path / "out" / f"{name}.png").exists() and (tmp_path / "out" / f"{name}-modes.png").exists()
    gd = found["methods"]["GD"]
    assert gd["relative_error_along"] == [[0.0] * 4]
    key = (
        "val_accuracy" if name in ("vit", "segmentation") else "val_frechet" if name == "gan" else "val_loss"
    )
    recorded = Trajectory.open(tmp_path / f"{name}-2.zarr").scalars[key]
    kept = next(iter(gd["scores"].values()))
    np.testing.assert_allclose(kept["along"][key][0], recorded[::4], rtol=1e-4)
    best = max if key == "val_accuracy" else min
    for label in ("GD", "CMD M=10", "EMA 0.9", "SWA last quarter", "PCA r=10"):
        method = found["methods"][label]
        *_, scores = method["scores"].values()
        assert best(scores["along"][key][0]) == scores["selected"][key][0]
        assert scores["along"][key][0][-1] == scores["last"][key][0]
        assert method["stored_bytes"][0] > 0
