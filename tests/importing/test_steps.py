"""Laws of the order: a step is what a name counts, or what a file says, and never where a text sorts."""

from __future__ import annotations

import pytest

from cmdgpu.errors import UsageError
from cmdgpu.importing.steps import Labelled, choose_steps, natural, step_in_name

NAMES: dict[str, int | None] = {
    "epoch_2.pt": 2,
    "epoch_10.pth": 10,
    "checkpoint-500": 500,
    "epoch=0-step=8.ckpt": 8,
    "step=120-epoch=3.ckpt": 120,
    "ep040-loss0.123.h5": 40,
    "ep040-val_loss12.weights.h5": 40,
    "model-00012.safetensors": 12,
    "model.100.pt": 100,
    "run3_net2_99.pt": 99,
    "ckpt_epoch_7_acc_93.bin": 7,
    "global_step1500": 1500,
    "iter_0032000": 32000,
    "run3_checkpoint-20": 20,
    "llama-7b-step40.pt": 40,
    "best_model_acc95.pt": None,
    "loss0.25.pt": None,
    "lr1e-05.pt": None,
    "last.ckpt": None,
    "best.pt": None,
    "step-100k.pt": None,
    "model-00001-of-00003.safetensors": None,
    "weights_99999999999999999999.pt": None,
    "deep3.pt": 3,
    "interval5.pt": 5,
    "val5.pt": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_tells_its_step(name: str) -> None:
    found = step_in_name(name)
    assert (None if found is None else found.step) == NAMES[name]


def test_text_order_is_not_the_order() -> None:
    names = ["model-10.pt", "model-2.pt", "model-1.pt", "a.pt"]
    assert sorted(names, key=natural) == ["a.pt", "model-1.pt", "model-2.pt", "model-10.pt"]


def labelled(*names: str, **told: int) -> list[Labelled]:
    """``told`` are the steps in files, by the name without its suffix."""
    return [Labelled(f"runs/{name}", name, told.get(name.partition(".")[0])) for name in names]


def test_the_file_speaks_where_no_name_does() -> None:
    assert choose_steps(labelled("b.pt", "a.pt", b=5, a=9)) == [5, 9]
    with pytest.raises(UsageError, match=r"neither name nor file tells the step of runs/a\.pt; give --steps"):
        choose_steps(labelled("b.pt", "a.pt", b=5))


def test_given_steps_override_names_and_are_counted() -> None:
    assert choose_steps(labelled("epoch_2.pt", "epoch_10.pt"), [100, 7]) == [100, 7]
    with pytest.raises(UsageError, match=r"1 steps for 2 checkpoints: runs/epoch_2\.pt, runs/epoch_10\.pt"):
        choose_steps(labelled("epoch_2.pt", "epoch_10.pt"), [100])
    with pytest.raises(UsageError, match=r"step 3 is told by runs/epoch_2\.pt, runs/epoch_10\.pt"):
        choose_steps(labelled("epoch_2.pt", "epoch_10.pt"), [3, 3])
    with pytest.raises(UsageError, match="step -1 cannot be stored"):
        choose_steps(labelled("epoch_2.pt"), [-1])


@pytest.mark.parametrize(
    "names",
    [
        ("step_100.pt", "epoch_3.pt"),
        ("model_10.pt", "ema_20.pt"),
        ("model_step10.pt", "ema_step20.pt"),
        ("checkpoint-5", "5.pt"),
    ],
)
def test_names_that_count_different_things_are_refused_and_listed(names: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match=r"count different things: .*give --steps") as refused:
        choose_steps(labelled(*names))
    assert all(f"runs/{name}" in str(refused.value) for name in names)


def test_numbers_before_the_step_may_differ() -> None:
    names = ["epoch=0-step=8.ckpt", "epoch=10-step=88.ckpt", "epoch=2-step=24.ckpt"]
    assert choose_steps(labelled(*names)) == [8, 88, 24]
    assert choose_steps(labelled("loss0.5-ep1.pt", "loss12.25-ep2.pt")) == [1, 2]


def test_a_shared_step_is_refused_and_the_owners_listed() -> None:
    with pytest.raises(UsageError, match=r"step 3 is told by runs/ep3\.pt, runs/ep003\.pt"):
        choose_steps(labelled("ep3.pt", "ep003.pt", "ep4.pt"))


def test_last_is_taken_by_the_step_in_its_file_where_names_and_files_agree() -> None:
    agree = {"step_1": 1, "step_2": 2}
    assert choose_steps(labelled("step_1.pt", "step_2.pt", "last.pt", **agree, last=3)) == [1, 2, 3]
    assert choose_steps(labelled("step_1.pt", "step_2.pt", "last.pt", **agree, last=2)) == [1, 2, None]
    assert choose_steps(labelled("step_1.pt", "step_2.pt", "last.pt", **agree)) == [1, 2, None]
    # the names count epochs and the files steps: its 3 is another 3
    disagree = {"epoch_1": 100, "epoch_2": 200}
    assert choose_steps(labelled("epoch_1.pt", "epoch_2.pt", "last.pt", **disagree, last=3)) == [1, 2, None]
