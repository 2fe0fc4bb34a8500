"""The paper's claims beside what was measured, from the JSON of the experiments: rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from benchmarks.experiments.report import numbers, treated
from cmdgpu.memory import show_bytes
from cmdgpu.notation import F64

Results: TypeAlias = Mapping[str, Any]
TOO_LONG = 1000.0
"""From here on a power of ten is shown."""
AVERAGES = ("EMA 0.9", "SWA last quarter", "LAWA 6")


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what the results of an experiment have to say about it."""

    text: str
    experiment: str
    measured: Callable[[Results], str]
    part: str = "config"
    """Of the results, without which there is nothing to say."""


# ---- numbers in words -----------------------------------------------------------------------------------


def spread(values: F64, digits: int = 2, unit: str = "") -> str:
    """Mean and sample standard deviation over the seeds; seeds without a number are counted out loud."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "not finite"
    form = f".{digits}f" if np.abs(known).max() < TOO_LONG else ".1e"
    text = f"{known.mean():{form}}"
    if len(known) > 1:
        text += f" ± {known.std(ddof=1):{form}}"
    missing = len(values) - len(known)
    return f"{text}{unit} ({missing} not finite)" if missing else f"{text}{unit}"


def percent(values: F64) -> str:
    return spread(100 * values, 1, " %")


def points(values: F64) -> str:
    """A difference of shares, in points of a hundred, with its sign."""
    text = spread(100 * values)
    return text if text.startswith(("-", "not")) else f"+{text}"


def accuracy(results: Results, label: str, at: str = "last", batch_norm: str = "reestimated") -> F64:
    """(seeds,) the experiment's score; with BatchNorm ``kept`` or ``reestimated`` where there is any."""
    scores = results["methods"][label]["scores"]
    return _scores((scores["none"] if "none" in scores else scores[batch_norm])[at], results["score"])


def _scores(found: Any, score: str) -> F64:
    """(seeds,) NaN where a method has no score, or no step with one."""
    if isinstance(found, Mapping):
        return numbers(cast(Mapping[str, Any], found).get(score, [None]))
    return numbers([None if each is None else each.get(score) for each in found])


def beside(results: Results, label: str, others: Sequence[str], at: str = "last") -> str:
    """Accuracy of one method, and how far it is above or below others, seed by seed."""
    mine = accuracy(results, label, at)
    found = {other: accuracy(results, other, at) for other in others if other in results["methods"]}
    parts = [f"{other} {percent(theirs)} ({points(mine - theirs)})" for other, theirs in found.items()]
    return f"{label} {percent(mine)}; {', '.join(parts)}"


def last_of(swept: Mapping[str, Any]) -> F64:
    """(samples or seeds,) test accuracy of a setting of a sweep, BatchNorm statistics measured anew."""
    *_, scores = swept["last"].values()
    return numbers(scores["test_accuracy"])


# ---- the claims -----------------------------------------------------------------------------------------


def _toy(results: Results) -> str:
    def errors(case: str, suffix: str = "") -> str:
        methods = results["cases"][case]["methods"]
        return " / ".join(
            f"{np.mean(numbers(methods[f'DMD r={r}{suffix}']['relative_error'])):.1g}" for r in (10, 50, 90)
        )

    cmd = np.mean(numbers(results["cases"]["augmented"]["methods"]["CMD M=10"]["relative_error"]))
    return (
        f"relative error at r = 10 / 50 / 90: {errors('plain')} without, {errors('augmented')} with "
        f"augmentation. Amplitudes from all snapshots instead of the first: "
        f"{errors('augmented', ', all snapshots')}; CMD of 10 modes: {cmd:.1g}"
    )


def _three_modes(results: Results) -> str:
    fit = results["methods"]["CMD M=3"]["fit"]
    medians = np.sort(numbers(fit["median_abs_correlation"]), axis=1)[:, ::-1].mean(axis=0)
    trained = accuracy(results, "GD")
    return (
        f"median \\|corr\\| of the three modes {' / '.join(f'{m:.4f}' for m in medians)}, "
        f"R² by energy {spread(numbers(fit['r2_energy']), 4)}; the network is {percent(trained)} right"
    )


def _above_gd(label: str) -> Callable[[Results], str]:
    def measured(results: Results) -> str:
        last = beside(results, label, ("GD", "EMA 0.9", "SWA last quarter", "LAWA 6"))
        selected = beside(results, label, ("GD", "EMA 0.9", "SWA last quarter", "LAWA 6"), "selected")
        return f"at the end {last}. Where validation selects: {selected}"

    return measured


def _dmd_fails(results: Results) -> str:
    parts = [
        f"r={r}: {percent(accuracy(results, f'node DMD r={r}'))}, weights off by "
        f"{np.mean(numbers(results['methods'][f'node DMD r={r}']['relative_error_along'])[:, -1]):.2g}"
        for r in (10, 50, 90)
        if f"node DMD r={r}" in results["methods"]
    ]
    return f"GD {percent(accuracy(results, 'GD'))}; DMD of every node, {'; '.join(parts)}"


def _flat_in_modes(results: Results) -> str:
    swept = results["sweeps"]["modes"]
    means = {m: float(np.mean(last_of(found))) for m, found in swept.items() if m != "GD"}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    shown = ", ".join(f"M={m}: {percent(last_of(swept[m]))}" for m in ("1", "2", "10", "100") if m in swept)
    return (
        f"{shown}; best M={best} ({100 * means[best]:.1f} %), worst M={worst} ({100 * means[worst]:.1f} %); "
        f"GD {percent(last_of(swept['GD']))}"
    )


def _error_in_modes(results: Results) -> str:
    swept = results["sweeps"]["modes"]
    return ", ".join(
        f"M={m}: {np.mean(numbers(swept[m]['fit']['weight_mse'])):.2e}"
        for m in ("1", "2", "5", "10", "20", "50", "100")
        if m in swept
    )


def _references_of_two(results: Results) -> str:
    found = numbers(results["sweeps"]["modes"]["2"]["fit"]["references_correlation"])
    return f"correlation of the two references {', '.join(f'{r:.2f}' for r in found)} (one number per seed)"


def _samples(results: Results) -> str:
    gd = last_of(results["sweeps"]["modes"]["GD"])
    found = last_of(results["sweeps"]["samples"]["1000"])
    above = int(np.sum(found > gd[:, None]))
    return (
        f"{found.shape[1]} samples of every run: {percent(found.mean(axis=1))}, deviation over those of "
        f"a run {_over_samples(found)} points; GD {percent(gd)}, below {above} of {found.size}"
    )


def _sample_sizes(results: Results) -> str:
    found = {k: last_of(swept) for k, swept in results["sweeps"]["samples"].items()}
    said = [f"K={k}: {percent(a.mean(axis=1))}, {_over_samples(a)}" for k, a in found.items()]
    return f"{'; '.join(said)}: the last number is the deviation over the samples of a run, in points"


def _over_samples(found: F64) -> str:
    return f"{100 * found.std(axis=1, ddof=1).mean():.2f}" if found.shape[1] > 1 else "-"


def _settings(sweep: str, said: str) -> Callable[[Results], str]:
    def measured(results: Results) -> str:
        swept = results["sweeps"][sweep]
        shown = ", ".join(f"{said.format(k)}: {percent(last_of(found))}" for k, found in swept.items())
        return f"{shown}; GD {percent(last_of(results['sweeps']['modes']['GD']))}"

    return measured


def _every_method(*more: str) -> Callable[[Results], str]:
    """The experiment's score, and ``more`` of them, at the last step; PCA stands in the table alone."""

    def measured(results: Results) -> str:
        def said(score: str) -> str:
            show = percent if score.endswith(("accuracy", "miou")) else _plainly
            parts = [
                f"{label} {show(_scores(treated(method)['last'], score))}"
                for label, method in results["methods"].items()
                if not label.startswith("PCA")
            ]
            return f"{score.replace('_', ' ')}: {', '.join(parts)}"

        return "; ".join(said(score) for score in (str(results["score"]), *more))

    return measured


def _translated(results: Results) -> str:
    real, untranslated = results["real_images_frechet"][0], results["untranslated_frechet"][0]
    return (
        f"{_every_method('test_frechet_reference')(results)}; lower is better, {real:.2f} between real "
        f"images, {untranslated:.1f} for untranslated ones"
    )


CLAIMS = (
    Claim(
        "Linear regression: DMD models plain gradient descent and fails with augmentation (section 2.2)",
        "toy",
        _toy,
    ),
    Claim(
        "SimpleNet2, plain gradient descent: three modes, two of them dense, one spread (Figs. 2a, 3)",
        "simple_net2",
        _three_modes,
    ),
    Claim(
        "SimpleNet, CIFAR-10, 12 modes: CMD follows GD, test accuracy slightly higher (Fig. 5a)",
        "simple_net",
        _above_gd("CMD M=12"),
    ),
    Claim("SimpleNet with augmentation: DMD fails at r = 10, 50, 90 (Fig. 5b)", "simple_net", _dmd_fails),
    Claim("ResNet-18: CMD of 10 modes is above GD (Fig. 7a)", "resnet", _above_gd("CMD M=10")),
    Claim(
        "ResNet-18: accuracy hardly depends on M, is best at M = 2, and M = 1 works (Figs. 6a, 9)",
        "resnet",
        _flat_in_modes, part="sweeps"),
    Claim("ResNet-18: the weights' MSE falls with M (Fig. 6b)", "resnet", _error_in_modes, part="sweeps"),
    Claim(
        "ResNet-18: two references that correlate at 0.22 (Fig. 25)",
        "resnet",
        _references_of_two,
        part="sweeps",
    ),
    Claim(
        "ResNet-18: robust to the sample, better than GD, M = 10, K = 1000 (Fig. 10)",
        "resnet",
        _samples,
        part="sweeps",
    ),
    Claim("ResNet-18: less variance for larger K, M = 10 (Fig. 11)", "resnet", _sample_sizes, part="sweeps"),
    Claim(
        "ResNet-18: with less history CMD does better (Fig. 13)",
        "resnet",
        _settings("history", "the last {} %"), part="sweeps"),
    Claim(
        "ResNet-18: sub-sampling snapshots by 2, 3, 4 costs very little (Fig. 14)",
        "resnet",
        _settings("stride", "every {}"), part="sweeps"),
    Claim(
        "ResNet-18 without augmentation: node-wise DMD breaks down at r = 10, 50, 90 (Fig. 22)",
        "resnet_plain",
        _dmd_fails,
    ),
    Claim(
        "ViT-B/16 from scratch: accuracy hardly depends on M (Fig. 16); reduced here", "vit", _every_method()
    ),
    Claim(
        "PSPNet, M = 10: CMD follows GD, steadier and above it in validation (Fig. 8); a stand-in here",
        "segmentation",
        _every_method("test_miou"),
    ),
    Claim(
        "StarGAN v2, a CMD per network: better than GD, as good as the EMA (Fig. 21); a stand-in here",
        "gan",
        _translated,
    ),
    Claim(
        "Transformers are modelled well by a few modes (abstract); a small GPT here", "gpt", _every_method()
    ),
)  # fmt: skip


def claim_rows(found: Mapping[str, Results]) -> list[list[str]]:
    """Claim, what was measured, where and how; only of experiments that have results."""
    return [
        [claim.text, claim.measured(found[claim.experiment]), where(found[claim.experiment])]
        for claim in CLAIMS
        if claim.part in found.get(claim.experiment, ())
    ]


def where(results: Results) -> str:
    machine = results["machine"]
    return f"{machine.get('gpu', machine['cpu'])}; `{results['command']}`"


# ---- every method ---------------------------------------------------------------------------------------


def method_head(results: Results) -> list[str]:
    score = str(results["score"]).replace("_", " ")
    return [
        "method",
        f"{score} at the end",
        *(["with kept statistics"] if _has_batch_norm(results) else []),
        "where validation selects",
        *(["test loss at the end"] if _has_other_loss(results) else []),
        "R² by energy",
        "weight MSE",
        "stored",
    ]


def method_rows(results: Results) -> list[list[str]]:
    """Means and deviations over the seeds; with BatchNorm, statistics are measured anew where not said."""
    show = percent if str(results["score"]).endswith("accuracy") else _plainly
    norm = _has_batch_norm(results)
    return [
        [
            label,
            show(accuracy(results, label)),
            *([show(accuracy(results, label, batch_norm="kept"))] if norm else []),
            show(accuracy(results, label, "selected")),
            *([_plainly(_scores(treated(method)["last"], "test_loss"))] if _has_other_loss(results) else []),
            _fit(method, "r2_energy", ".4f"),
            _fit(method, "weight_mse", ".2e"),
            show_bytes(int(numbers(method["stored_bytes"]).mean())),
        ]
        for label, method in results["methods"].items()
    ]


def remarks(results: Results, label: str = "CMD M=10") -> list[str]:
    """Whom CMD beats in this experiment, and whether its modes are better than chance."""
    lines: list[str] = []
    rivals = [r for r in ("GD", *AVERAGES) if r in results["methods"]]
    if label not in results["methods"] or not str(results["score"]).endswith("accuracy"):
        return lines
    gains = {rival: accuracy(results, label) - accuracy(results, rival) for rival in rivals}
    beaten = [rival for rival, gain in gains.items() if _clearly_above_zero(gain)]
    others = [rival for rival in rivals if rival not in beaten]
    shown = ", ".join(f"{rival} {points(gain)}" for rival, gain in gains.items())
    said = [f"beats {', '.join(beaten)}"] if beaten else []
    said += [f"does not beat {', '.join(others)}"] if others else []
    lines.append(f"At the end {label} {' and '.join(said)} (points of accuracy: {shown}).")
    fit = results["methods"][label]["fit"]
    if "levels" in fit:
        levels, chance = numbers(fit["levels"]), numbers(fit["chance"])
        lines.append(
            f"Its mean \\|corr\\| is {spread(levels, 3)}, of rows that share nothing {spread(chance, 3)}: "
            f"{', '.join(fit['verdict'])}."
        )
    return lines


def _clearly_above_zero(gains: F64) -> bool:
    """The mean over the seeds is more than the deviation; one seed proves nothing."""
    return len(gains) > 1 and bool(gains.mean() > gains.std(ddof=1))


def _has_batch_norm(results: Results) -> bool:
    return "none" not in results["methods"]["GD"]["scores"]


def _has_other_loss(results: Results) -> bool:
    return results["score"] != "test_loss" and "test_loss" in treated(results["methods"]["GD"])["last"]


def _plainly(values: F64) -> str:
    return spread(values, 3)


def _fit(method: Mapping[str, Any], key: str, digits: str) -> str:
    values = numbers(method["fit"].get(key, [None]))
    if np.isnan(values).all():
        return "-"
    mean = float(np.nanmean(values))
    return f"{mean:{digits if abs(mean) < TOO_LONG else '.1e'}}"
