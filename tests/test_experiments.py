"""The experiments run tiny, on images made here: runs go on, tables are filled."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmdgpu import Trajectory
from cmdgpu.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.syspath_prepend(str(ROOT))  # pyright: ignore[reportUnknownMemberType]


@pytest.fixture(autouse=True)
def images(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """200 training images of ten classes that differ in brightness, 40 test images; one thread."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 200), ("test", 40)):
        y = np.arange(n, dtype=np.uint8) % 10
        x = rng.integers(0, 100, (n, 32, 32, 3)) + 15 * y[:, None, None, None]
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y}
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "cifar10.npz", **arrays)
    monkeypatch.setenv("CMDGPU_DATA", str(folder))
    return arrays


def run(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """One experiment, as from the command line; its JSON, empty where nothing was analysed."""
    from importlib import import_module

    module: Any = import_module(f"benchmarks.experiments.{name}")
    module.main(["--in", str(folder), "--out", str(folder / "out"), *flags])
    written = folder / "out" / f"{name}.json"
    return json.loads(written.read_text()) if written.exists() else {}


TINY = ("--width", "2", "--judged-every", "2", "--images", "100")


# ---- data -----------------------------------------------------------------------------------------------


def test_validation_images_stay_the_same_whatever_is_trained_on(images: dict[str, Any]) -> None:
    from benchmarks.experiments.data import cifar10

    every, few = cifar10(), cifar10(30)
    assert (len(every.train), len(every.validation), len(every.test), len(few.train)) == (180, 20, 40, 30)
    assert torch.equal(few.validation.x, every.validation.x)
    assert torch.equal(few.train.x, every.train.x[:30])
    rows = torch.cat([every.train.x, every.validation.x]).flatten(1)
    assert len({row.numpy().tobytes() for row in rows}) == 200, "no image is in two splits, none is lost"
    pixels = every.normalised(every.train.x)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    pair = cifar10(classes=(3, 5))
    assert pair.test.y.tolist() == [int(y == 5) for y in images["y_test"] if y in (3, 5)]


def test_an_augmented_image_is_a_crop_of_the_padded_one_or_its_mirror() -> None:
    from benchmarks.experiments.data import augmented

    torch.manual_seed(0)
    x = torch.randint(0, 256, (20, 6, 6, 3), dtype=torch.uint8)
    found: set[tuple[int, int, bool]] = set()
    for image, got in zip(x, augmented(x), strict=True):
        padded = np.pad(image.numpy(), ((4, 4), (4, 4), (0, 0)))
        ways = [
            (i, j, mirror)
            for i in range(9)
            for j in range(9)
            for mirror in (False, True)
            if np.array_equal(padded[i : i + 6, j : j + 6][:, :: -1 if mirror else 1], got.numpy())
        ]
        assert ways
        found.add(ways[0])
    assert len(found) > 10 and {mirror for _, _, mirror in found} == {False, True}


def test_no_images_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.experiments import data

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setenv("CMDGPU_DATA", str(tmp_path))
    monkeypatch.setattr(data.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"has no cifar10\.npz, and torchvision is not installed"):
        data.cifar10()


# ---- networks and training ------------------------------------------------------------------------------


def test_the_networks_have_the_size_of_the_paper() -> None:
    from benchmarks.experiments.resnet import resnet18
    from benchmarks.experiments.simple_net import simple_net

    def size(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert size(simple_net()) == 93_974
    assert size(resnet18()) == 11_173_962


def test_a_gradient_is_that_of_the_whole_batch() -> None:
    """One step of plain descent on 180 images, more than are taken at once."""
    from benchmarks.experiments import classification, simple_net
    from benchmarks.experiments.data import cifar10

    images = cifar10()
    task = classification.Classification(
        images,
        build=lambda: simple_net.simple_net(2),
        build_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        epochs=1,
        batch=len(images.train),
        augment=False,
    )
    torch.manual_seed(0)
    model = task.model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = classification.loss_of(model(images.normalised(images.train.x)), images.train.y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    scalars = task.train_epoch(model, task.optimizers(model), 1)
    assert len(images.train) > classification.AT_ONCE
    assert scalars["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient, atol=1e-6, rtol=1e-5)


def test_a_longer_run_continues_and_other_settings_are_refused(tmp_path: Path) -> None:
    train = ("--seeds", "0", "--width", "2", "--images", "100", "--only", "train")
    run("simple_net", tmp_path, *train, "--epochs", "1")
    run("simple_net", tmp_path, *train, "--epochs", "2", "--judged-every", "1")
    assert Trajectory.open(tmp_path / "simple_net-0.zarr").steps.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match=r"'rate': 0\.001.*'rate': 0\.5"):
        run("simple_net", tmp_path, *train, "--epochs", "2", "--rate", "0.5")


# ---- analysis -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_and_selection_are_those_of_the_recorded_run(tmp_path: Path) -> None:
    found = run("simple_net", tmp_path, *TINY, "--seeds", "0:2", "--epochs", "4")
    assert found["command"] == (
        "python -m benchmarks.experiments.simple_net --seeds 0:2 --in DIR --epochs 4 --images 100 --width 2 "
        "--judged-every 2"
    )
    gd = found["methods"]["GD"]
    scores = gd["scores"]["none"]
    assert found["steps"] == [[0, 2, 4]] * 2
    assert gd["relative_error_along"] == [[0.0] * 3] * 2
    for seed in (0, 1):
        traj = Trajectory.open(tmp_path / f"simple_net-{seed}.zarr")
        accuracy, loss = traj.scalars["val_accuracy"][::2], traj.scalars["val_loss"][::2]
        np.testing.assert_allclose(scores["along"]["val_accuracy"][seed], accuracy, rtol=1e-4)
        np.testing.assert_allclose(scores["along"]["val_loss"][seed], loss, rtol=1e-4)
        best = np.flatnonzero(accuracy == accuracy.max())
        assert scores["selected"]["step"][seed] == 2 * best[np.argmin(loss[best])]
    assert {len(fit) for fit in found["methods"]["CMD M=10"]["fit"].values()} == {2}
    for name in ("simple_net.png", "simple_net-modes.png"):
        assert (tmp_path / "out" / name).stat().st_size < 100_000


@pytest.mark.slow
def test_the_page_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network with BatchNorm, with all that is asked of one run, in every row of the tables."""
    from benchmarks import render
    from benchmarks.experiments import claims, sweeps

    for name, fewer in (
        ("MODES", (1, 2, 10)),
        ("SAMPLES", (50, 1000)),
        ("RESAMPLED", 2),
        ("HISTORIES", (100, 50)),
    ):
        monkeypatch.setattr(sweeps, name, fewer)
    tiny = ("--seeds", "0", "--width", "2")
    found = run("resnet", tmp_path, *tiny, "--images", "40", "--epochs", "11", "--judged-every", "11")
    assert set(found["methods"]["GD"]["scores"]) == {"kept", "reestimated"}
    [samples] = found["sweeps"]["samples"]["1000"]["last"]["reestimated"]["test_accuracy"]
    assert len(samples) == 4
    run("simple_net2", tmp_path, *tiny, "--images", "20", "--epochs", "4", "--steps", "1")
    two = json.loads((tmp_path / "out" / "simple_net2.json").read_text())
    page = "\n".join(render.experiments({"simple_net2": two, "resnet": found, "resnet_plain": found}))
    for claim in claims.CLAIMS:
        assert (claim.text in page) == (claim.experiment in ("simple_net2", "resnet", "resnet_plain"))
    assert "nan" not in page
    gd = found["methods"]["GD"]["scores"]["reestimated"]["last"]["test_accuracy"][0]
    assert f"| GD | {100 * gd:.1f} % |" in page


def test_the_page_is_rendered_from_the_json_of_the_experiments() -> None:
    from benchmarks import render

    page = render.PAGE.read_text()
    assert render.EXPERIMENTS in page
    assert render.experiments_rendered(page, render.experiments_found()) == page


def test_an_analysis_that_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cmdgpu

    first = run("simple_net", tmp_path, *TINY, "--seeds", "0", "--epochs", "2")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("compared again")

    with monkeypatch.context() as patch:
        patch.setattr(cmdgpu, "compare", forbidden)
        assert run("simple_net", tmp_path, *TINY, "--seeds", "0", "--epochs", "2") == first
        with pytest.raises(AssertionError, match="compared again"):
            run("simple_net", tmp_path, *TINY, "--seeds", "0", "--epochs", "3")


def test_a_file_has_a_line_for_every_value_and_record_and_none_for_a_number(tmp_path: Path) -> None:
    from benchmarks.experiments.report import write

    records: list[Any] = [{"a": "[x  {y", "b": [1, [2.5, None]]}, {"a": "", "b": []}]
    written = write(tmp_path / "new", "name", "command", {"records": records, "none": {}, "pair": (1, 2)})
    text = written.read_text()
    head = {"experiment": "name", "command": "command"}
    assert {**head, "records": records, "none": {}, "pair": [1, 2]}.items() <= json.loads(text).items()
    assert text[text.index(' "records"') :].splitlines() == [
        ' "records": [',
        "  {",
        '   "a": "[x  {y",',
        '   "b": [1, [2.5, null]]',
        "  },",
        "  {",
        '   "a": "",',
        '   "b": []',
        "  }",
        " ],",
        ' "none": {},',
        ' "pair": [1, 2]',
        "}",
    ]
    with pytest.raises(ValueError, match="JSON compliant"):
        write(tmp_path, "name", "command", {"nan": [float("nan")]})


def test_seeds_are_lists_and_what_one_lacks_is_none() -> None:
    from benchmarks.experiments.analysis import merged
    from benchmarks.experiments.claims import percent, points

    parts = [{"a": {"x": 1, "y": [1, 2]}}, {"a": {"y": [3, 4], "z": 5}}]
    assert merged(parts) == {"a": {"x": [1, None], "y": [[1, 2], [3, 4]], "z": [None, 5]}}
    assert percent(np.array([0.5, 0.6])) == "55.0 ± 7.1 %"
    assert percent(np.array([0.5, np.nan])) == "50.0 % (1 not finite)"
    assert points(np.array([0.01, 0.01])) == "+1.00 ± 0.00"


# ---- the toy --------------------------------------------------------------------------------------------


def test_the_toy_is_eqs_4_and_5_and_dmd_holds_then_fails(tmp_path: Path) -> None:
    from benchmarks.experiments import toy

    config = toy.Config(epochs=100)
    W, losses = toy.trajectory(config, 0, augment=False)
    d, m = config.outputs, config.inputs
    w = W.reshape(d, m, -1)
    # the fixed point of Eq. 4 is the solution y = w x: deviations shrink by one matrix, I - eta x x^T
    steps = np.diff(w, axis=2)
    propagator, *_ = np.linalg.lstsq(
        steps[:, :, :-1].transpose(0, 2, 1).reshape(-1, m), steps[:, :, 1:].transpose(0, 2, 1).reshape(-1, m)
    )
    np.testing.assert_allclose(steps[:, :, 0] @ propagator, steps[:, :, 1], atol=1e-8)
    np.testing.assert_allclose(propagator, propagator.T, atol=1e-4)
    assert np.all(np.diff(losses) < 0)
    plain = {label: error for label, (error, _) in toy.relative_errors(W).items()}
    shaken, losses = toy.trajectory(config, 0, augment=True)
    augmented = {label: error for label, (error, _) in toy.relative_errors(shaken).items()}
    assert np.any(np.diff(losses) > 0)
    assert plain["DMD r=10"] < 1e-3 and augmented["DMD r=10"] > 0.3
    assert plain["PCA r=1"] > plain["CMD M=10"] > 1e-3


def test_the_toy_is_written(tmp_path: Path) -> None:
    from benchmarks.experiments import claims, toy

    toy.main(["--seeds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "toy.json").read_text())
    [row] = claims.claim_rows({"toy": results})
    assert "relative error at r = 10 / 50 / 90" in row[1] and "experiments.toy" in row[2]
    assert (tmp_path / "toy.png").stat().st_size < 100_000
