"""Laws of the demo: the numbers are honest, the same every time, and no foreign file is touched."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmdgpu
from cmdgpu import demo
from cmdgpu.demo import DemoReport, digits, outcome, run_demo
from cmdgpu.errors import CmdgpuError, StoreExists

CPU = torch.device("cpu")
EPOCHS = 3


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    return run_demo(tmp_path_factory.mktemp("demo"), epochs=EPOCHS)


class Claimed(Exception):
    """The directory is claimed and nothing was trained yet."""


@pytest.fixture
def nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo stops before it trains: its directory is claimed by then."""

    def stop() -> None:
        raise Claimed

    monkeypatch.setattr(demo, "load_digits", stop)


def claim(directory: Path) -> None:
    with pytest.raises(Claimed):
        run_demo(directory)


def numbers(report: DemoReport) -> dict[str, Any]:
    """The report without times and places."""
    content = report.to_json()
    for key in ("dir", "trajectory", "figures", "report", "elapsed_s"):
        del content[key]
    for fit in content["fit"].values():
        for key in ("result", "fit_s", "bytes_per_s"):
            del fit[key]
    return content


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


# --- the data --------------------------------------------------------------------------------------


def test_the_shipped_images_are_the_uci_test_set() -> None:
    scans = digits.load_digits()
    assert scans.images.shape == (1797, 8, 8)
    assert scans.images.dtype == scans.labels.dtype == np.uint8
    assert np.bincount(scans.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (
        hashlib.sha256(scans.images.tobytes() + scans.labels.tobytes()).hexdigest()
        == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    )


def test_every_image_is_in_exactly_one_split() -> None:
    scans = digits.load_digits()
    images = digits.split_digits(scans, 0, CPU)
    assert (len(images.train), len(images.held_out)) == (1000, 797)
    together = (16 * torch.cat([images.train, images.held_out])[:, 0]).numpy().astype(np.uint8)
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in scans.images)
    assert not np.array_equal(together, scans.images)


def test_images_and_labels_are_shuffled_together() -> None:
    scans = digits.load_digits()
    label_of = {image.tobytes(): int(label) for image, label in zip(scans.images, scans.labels, strict=True)}
    images = digits.split_digits(scans, 3, CPU)
    for image, label in zip(images.held_out, images.held_out_labels, strict=True):
        assert label_of[(16 * image[0]).numpy().astype(np.uint8).tobytes()] == int(label)


def test_a_shifted_image_is_the_image_moved_by_at_most_one_pixel() -> None:
    images = torch.rand(200, 1, 8, 8) + 0.1
    moved = digits.shifted(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    candidates = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    matches = (candidates == moved).flatten(start_dim=2).all(dim=2)
    assert matches.sum(dim=0).eq(1).all()
    assert matches.sum(dim=1).gt(0).all()


# --- the numbers -----------------------------------------------------------------------------------


def test_what_is_reported_of_the_training_is_what_was_recorded_while_training(report: DemoReport) -> None:
    trajectory = cmdgpu.Trajectory.open(report.trajectory)
    assert trajectory.shape == (report.n_parameters, report.n_snapshots) == (101_626, EPOCHS + 1)
    assert trajectory.steps.tolist() == list(range(EPOCHS + 1))
    assert report.training.last_validation == trajectory.scalars["validation_accuracy"][-1]
    assert np.all(np.diff(trajectory.scalars["train_loss"]) < 0)
    assert report.trajectory_bytes == trajectory.stored_bytes


def test_the_initial_state_is_recorded_before_anything_is_learned(report: DemoReport) -> None:
    first = cmdgpu.Trajectory.open(report.trajectory).state_dict(0)
    initial = digits.initial_model(0, CPU).state_dict()
    assert list(first) == list(initial)
    assert all(torch.equal(first[name], tensor) for name, tensor in initial.items())


def test_a_few_epochs_beat_guessing_by_far(report: DemoReport) -> None:
    assert report.training.last_test > 0.5


def test_reported_scores_are_those_of_the_models_rebuilt_from_the_results(report: DemoReport) -> None:
    images = digits.split_digits(digits.load_digits(), report.seed, CPU)
    assert [fit.n_modes_asked for fit in report.fits] == list(demo.MODES)
    for fit in report.fits:
        model = digits.digit_classifier()
        cmd = cmdgpu.CMD.load(fit.result)
        cmd.load_into(model, -1)
        assert digits.judge(model, images).test == fit.score.last_test
        cmd.load_into(model, fit.score.selected_epoch)
        assert digits.judge(model, images).test == fit.score.selected_test
        assert digits.judge(model, images).validation == fit.score.selected_validation


def test_reported_weight_errors_and_correlations_are_those_of_the_rebuilt_rows(report: DemoReport) -> None:
    W_nt = cmdgpu.Trajectory.open(report.trajectory)[:, :].astype(np.float64)
    for fit in report.fits:
        cmd = cmdgpu.CMD.load(fit.result)
        What_nt = np.stack([flat(cmd.state_dict(step)) for step in range(report.n_snapshots)], axis=1)
        assert fit.weight_mse == pytest.approx(np.mean((W_nt - What_nt) ** 2), rel=1e-3)
        x_nt, y_nt = W_nt - W_nt.mean(1, keepdims=True), What_nt - What_nt.mean(1, keepdims=True)
        moving = np.ptp(W_nt, axis=1) > 0
        x_nt, y_nt = x_nt[moving], y_nt[moving]
        correlation = (x_nt * y_nt).sum(1) / np.sqrt((x_nt**2).sum(1) * (y_nt**2).sum(1))
        assert fit.r2_energy == pytest.approx(1 - ((x_nt - y_nt) ** 2).sum() / (x_nt**2).sum(), abs=1e-4)
        assert fit.mean_abs_correlation == pytest.approx(np.abs(correlation).mean(), abs=2e-3)


def flat(state: dict[str, torch.Tensor]) -> Any:
    return torch.cat([tensor.flatten() for tensor in state.values()]).double().numpy()


def test_more_modes_fit_no_worse_than_one(report: DemoReport) -> None:
    one, *more = report.fits
    for fit in more:
        assert fit.mean_abs_correlation > one.mean_abs_correlation
        assert fit.null.mean > one.null.mean


def test_the_first_held_out_images_validate_and_the_rest_test() -> None:
    images = digits.split_digits(digits.load_digits(), 0, CPU)
    logits = torch.nn.functional.one_hot(images.held_out_labels, 10).float()
    logits[297:] = logits[297:].roll(1, dims=1)

    class Answers(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.equal(x, images.held_out)
            return logits

    verdict = digits.judge(Answers(), images)
    assert (verdict.validation, verdict.test) == (1.0, 0.0)
    assert verdict.validation_loss == pytest.approx(np.log(np.e + 9) - 1)


def test_validation_images_select_and_test_images_do_not() -> None:
    steps = np.array([0, 10, 20, 30, 40])
    validation, loss = np.array([0.5, 0.9, 0.9, 0.9, 0.8]), np.array([9.0, 0.3, 0.2, 0.2, 0.1])
    for best in range(5):
        test = np.where(np.arange(5) == best, 1.0, 0.1 * np.arange(5))
        chosen = outcome.score_of(steps, outcome.Curve(validation, loss, test))
        assert chosen.selected_epoch == 20
        assert chosen.selected_validation == 0.9
        assert chosen.selected_test == test[2]
        assert chosen.last_test == test[4]


def test_the_same_seed_gives_the_same_numbers_whatever_the_threads_and_the_global_state(
    report: DemoReport, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(12345)
        torch.set_num_threads(3)
        before = torch.get_rng_state()
        again = run_demo(tmp_path / "again", epochs=EPOCHS)
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_rng_state(state)
    assert numbers(again) == numbers(report)


def test_the_seed_decides_the_split_and_the_initial_weights() -> None:
    scans = digits.load_digits()
    assert not torch.equal(digits.split_digits(scans, 0, CPU).train, digits.split_digits(scans, 1, CPU).train)
    first, second = digits.initial_model(0, CPU), digits.initial_model(1, CPU)
    assert not torch.equal(flat_of(first), flat_of(second))
    assert torch.equal(flat_of(first), flat_of(digits.initial_model(0, CPU)))


def flat_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- what is written -------------------------------------------------------------------------------


def test_the_table_fits_a_terminal_and_has_a_row_for_the_training_and_each_decomposition(
    report: DemoReport,
) -> None:
    table = report.table()
    assert max(map(len, table.splitlines()[:12])) <= 110
    assert sum(line.startswith("training") for line in table.splitlines()) == 1
    for fit in report.fits:
        (row,) = [line for line in table.splitlines() if line.startswith(f"CMD, M = {fit.n_modes_asked} ")]
        assert f"{100 * fit.score.last_test:.1f} %" in row
        assert f"{fit.null.low:.3f}-{fit.null.high:.3f}" in row


def test_the_table_names_decompositions_that_random_walks_equal(report: DemoReport) -> None:
    below = [str(fit.n_modes_asked) for fit in report.fits if fit.mean_abs_correlation <= fit.null.high]
    said = [line for line in report.table().splitlines() if line.startswith("null")]
    assert said == (
        [f"null      |corr| is not above that of random walks: M = {', '.join(below)}"] if below else []
    )


def test_the_report_on_disk_is_strict_json_and_equals_the_one_returned(report: DemoReport) -> None:
    on_disk = json.loads((report.directory / demo.MARKER).read_text())
    assert on_disk == report.to_json()
    assert on_disk["kind"] == "cmdgpu demo"
    json.dumps(report.to_json(), allow_nan=False)


def test_exactly_the_files_it_speaks_of_lie_in_the_directory(report: DemoReport) -> None:
    spoken = {report.trajectory, *(fit.result for fit in report.fits), *report.figures, report.page}
    assert set(report.directory.iterdir()) == {*spoken, report.directory / demo.MARKER}
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in report.figures)


def test_the_page_shows_the_finest_fit_all_of_them_and_the_scores(report: DemoReport) -> None:
    page = report.page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data"[^>]*>(.*?)</script>', page, re.DOTALL)
    shown = json.loads(found)
    assert [fit["n_modes"] for fit in shown["fits"]] == [fit.n_modes for fit in report.fits]
    assert [fit["this"] for fit in shown["fits"]] == [False, False, False, True]
    last = {row["label"]: row["scores"]["test_accuracy"] for row in shown["methods"]["last"]}
    assert last["training"] == pytest.approx(report.training.last_test)
    assert last["CMD, M = 10"] == pytest.approx(report.fits[-1].score.last_test)
    assert "validation_accuracy" in shown["scalars"] and shown["unit"] == "epoch"


# --- the directory ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_trained")
class TestTheDirectory:
    def test_an_absent_or_empty_one_is_taken(self, tmp_path: Path) -> None:
        claim(tmp_path / "deep" / "down")
        assert json.loads((tmp_path / "deep" / "down" / demo.MARKER).read_text()) == {"kind": "cmdgpu demo"}
        (tmp_path / "empty").mkdir()
        claim(tmp_path / "empty")

    @pytest.mark.parametrize(
        ("name", "content", "found"),
        [
            ("notes.txt", "mine", "holds files that no demo wrote"),
            ("run.zarr/zarr.json", "{}", "already holds a demo; choose another directory or remove it"),
            ("demo.json", '{"kind": "something else"}', "holds files that no demo wrote"),
            ("demo.json", '{"kind": "cmdgpu', "holds files that no demo wrote"),
            ("demo.json", "[]", "holds files that no demo wrote"),
        ],
    )
    def test_one_that_holds_anything_else_is_refused_untouched(
        self, tmp_path: Path, name: str, content: str, found: str
    ) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        before = tree(tmp_path)
        with pytest.raises(StoreExists, match=found):
            run_demo(tmp_path)
        assert tree(tmp_path) == before

    def test_a_file_in_its_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "demo").write_text("mine")
        with pytest.raises(StoreExists, match="is not a directory"):
            run_demo(tmp_path / "demo")
        assert (tmp_path / "demo").read_text() == "mine"

    def test_an_earlier_demo_is_replaced_and_everything_else_in_it_stays(self, tmp_path: Path) -> None:
        claim(tmp_path)
        mine = ["notes.txt", "modes-3.cmd.zarr/zarr.json", "accuracy.png.bak", "other.zarr/zarr.json"]
        ours = [
            "run.zarr/zarr.json",
            "modes-1.cmd.zarr/zarr.json",
            "modes-10.cmd.zarr.0123abcd.partial/zarr.json",
            "run.zarr.0123abcd.partial/zarr.json",
            "accuracy.png",
            "modes.png",
            "correlation.png",
            "report.html",
        ]
        for name in [*mine, *ours]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        claim(tmp_path)
        files = {name for name, content in tree(tmp_path).items() if content is not None}
        assert files == {*mine, demo.MARKER}
        assert not (tmp_path / "run.zarr").exists()

    def test_a_link_in_place_of_a_store_is_removed_and_what_it_points_to_stays(self, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "weights").write_text("mine")
        claim(tmp_path / "demo")
        (tmp_path / "demo" / "run.zarr").symlink_to(precious)
        claim(tmp_path / "demo")
        assert (precious / "weights").read_text() == "mine"
        assert not (tmp_path / "demo" / "run.zarr").is_symlink()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"epochs": 1}, "epochs is 1"),
            ({"seed": -1}, "seed is -1"),
            ({"device": "abacus"}, "no device named 'abacus'"),
            ({"device": "cuda:99"}, "cuda:99"),
        ],
    )
    def test_impossible_wishes_are_refused_before_it_is_touched(
        self, tmp_path: Path, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(CmdgpuError, match=said):
            run_demo(tmp_path / "demo", **options)
        assert not (tmp_path / "demo").exists()
