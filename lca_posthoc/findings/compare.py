"""Compare runs: layer sums, their spread over repeats, whether labels differ, and the other
differences between the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import scipy  # loads its submodules on first use
import xarray as xr

from ..base.declarations import BY, TOP, Finding
from ..base.text import count
from ..errors import InputError, few
from ..results import LossResults
from .bands import path_bands
from .common import about, described, label_of, unfinished
from .design import Design, design_of, differences
from .summary import Figures, Part, summary

FINDING = Finding(
    question="Do settings differ, over repeats",
    needs="several runs",
    place=110,
    sampled=True,
    runs="compared",
    options=(BY, TOP),
)

_HEAD: tuple[Literal["helping", "loss_end", "loss_change"], ...] = (
    "helping",
    "loss_end",
    "loss_change",
)
# relative to the mean; repeats that differ by less count as equal
_ROUNDING = 16 * np.finfo(float).eps

Numbers = np.ndarray[Any, Any]


def compare(
    runs: Mapping[str, Sequence[LossResults] | LossResults],
    *,
    by: str | int = "module",
    confidence: float = 0.95,
    paired: bool | None = None,
) -> xr.Dataset:
    """Compare the allocation of each layer in runs under several labels, with intervals and
    p-values over repeats.

    The runs under one label count as independent repeats, such as seeds. Their layer sums get
    Student's t interval and the one-sample t-test against 0. Against the runs of the first label
    they get Welch's t-test, or the paired t-test if runs form pairs: each run of either label
    begins from the same checkpoint as one of the other. All p are two-sided. `p_holm` corrects for
    all layers of all labels together, `p_difference_holm` for all layers of all labels except the
    first (Holm 1979): if there are no differences, the chance that any p of such a family falls
    below α is at most α. Results that need more repeats (two for an interval or a p, on both sides
    of a difference) are NaN, and so is a p of numbers without any spread.

    Runs of one training are no repeats of each other: those that share a checkpoint that training
    has moved to, for example a copy, or a replay under another rule or `--norm-stats`, or over
    other steps. Such a training counts once under one label, by the first of its runs. Labels that
    share trainings are compared in pairs or not tested. `attrs["notes"]` reports this, and names
    settings, splits, examples and steps in which the runs differ, a line each.

    Sums include the finished segments. Runs may have different numbers of steps and different
    layers.

    Args:
        runs: results of one loss without groups, or several of them, by label.
        by: layers by "module", by "tensor", or by that many parts of the module's name. Buffers
            that moved are layers of their own, as in `layers`.
        confidence: of the intervals, between 0 and 1.
        paired: True pairs the k-th run of every label with the k-th of the first, for runs that
            share a seed and no checkpoint; False never pairs; None pairs by the first checkpoint.

    Returns:
        `total` (label, layer, run) in units of loss, NaN where a label has fewer runs or a run
        lacks the layer; `mean`, `low`, `high`, `p`, `p_holm` (label, layer); `difference`,
        `p_difference`, `p_difference_holm` (label, layer) to the first label; `loss_end` (label)
        and, if every run was made with `--keep statistics` or more, `helping` (label; share of
        parameters × segments), means over runs, each with `_low` and `_high`; `loss_change`
        (label), a mean; `p_loss_end` (label), the test of the last loss against the first label,
        not corrected; `path_band` (label, layer), how much other paths through the same
        checkpoints would change `mean`, averaged over runs that measured it on segments longer than
        one training step (else NaN): it is no spread over repeats, enters no interval and no p, and
        does not shrink with more of them; `runs` (label), their number; `trainings` (label), the
        number of different trainings among them; `paired` (label), whether the tests against the
        first label are paired; coord `path` (label, run).

    Raises:
        InputError: for no runs, a run given twice under one label, a loss with groups, an
            impossible confidence, or `paired` where labels have different numbers of runs.
        LCAError: if a run has no finished segment yet, or stored numbers are damaged.
    """
    if isinstance(confidence, bool) or not 0 < confidence < 1:
        raise InputError(f"confidence is a number between 0 and 1, got {confidence!r}.")
    listed = _listed(runs)
    summaries = [[_figures(results) for results in several] for several in listed.values()]
    design = design_of(listed, paired)
    layers = list(
        dict.fromkeys(
            _label(tensor, by) for some in summaries for one in some for tensor in one["tensors"]
        )
    )
    total = padded([[_layer_sums(one, layers, by) for one in some] for some in summaries])
    head: dict[str, Repeats] = {
        name: repeats(
            design.counted(padded([[one[name] for one in some] for some in summaries])),
            confidence,
            design.pairs,
        )
        for name in _HEAD
        if all(name in one for some in summaries for one in some)
    }
    variables = _of_layers(
        total, repeats(design.counted(total), confidence, design.pairs), confidence
    )
    variables["path_band"] = (
        ("label", "layer"),
        _path_bands(listed, layers, by),
        "loss",
        "changed by another path, mean over runs",
    )
    about_paths = _within_paths(variables["difference"][1], variables["path_band"][1])
    variables |= _of_labels(head, confidence) | _of_design(design, listed)
    left_out = [word for several in listed.values() for one in several for word in _left_out(one)]
    left_out += _unlike(
        [(label, one) for label, some in zip(listed, summaries, strict=True) for one in some], by
    )
    notes = "\n".join([*design.notes, *differences(listed), *about_paths])
    return xr.Dataset(
        {
            name: described((dims, values), units, text)
            for name, (dims, values, units, text) in variables.items()
        },
        coords={
            "label": np.array(list(listed), dtype=object),
            "layer": np.array(layers, dtype=object),
            "path": (("label", "run"), _paths(listed)),
        },
        attrs=_about(listed, left_out, _without_shares(listed))
        | {"by": str(by), "confidence": float(confidence), "notes": notes},
    )


def _paths(listed: dict[str, list[LossResults]]) -> Numbers:
    """Return the paths of the runs, (label, run), "" where a label has fewer."""
    paths = np.full((len(listed), max(map(len, listed.values()))), "", dtype=object)
    for row, several in enumerate(listed.values()):
        paths[row, : len(several)] = [str(results.path) for results in several]
    return paths


def _of_design(
    design: Design, listed: dict[str, list[LossResults]]
) -> dict[str, tuple[tuple[str, ...], Any, str, str]]:
    """Return the number of runs and of trainings under each label, and whether they form pairs."""
    return {
        "runs": (
            ("label",),
            np.array([len(several) for several in listed.values()]),
            "runs",
            "runs under the label",
        ),
        "trainings": (
            ("label",),
            design.once.sum(axis=1),
            "trainings",
            "different trainings under the label, each counted once",
        ),
        "paired": (
            ("label",),
            np.array([isinstance(order, list) for order in design.pairs]),
            "",
            "tests against the first label are of pairs of runs",
        ),
    }


def _listed(
    runs: Mapping[str, Sequence[LossResults] | LossResults],
) -> dict[str, list[LossResults]]:
    """Return every label's results as a list; reject what cannot be compared.

    Raises:
        InputError: with the reason.
    """
    if not isinstance(runs, Mapping) or not runs:
        raise InputError(
            'nothing to compare: pass {"label": [results, …], …} with results such as '
            'open_run(RUN)["train"].'
        )
    listed: dict[str, list[LossResults]] = {}
    for label, one in runs.items():
        several = [one] if isinstance(one, LossResults) else list(one)
        if (
            not isinstance(label, str)
            or not several
            or not all(isinstance(results, LossResults) for results in several)
        ):
            raise InputError(
                f'label {label!r} needs one or more results such as open_run(RUN)["train"], '
                f"not an empty list or something else."
            )
        listed[label] = several
        seen = set()
        for results in several:
            if results.record.groups is not None:
                raise InputError(
                    f"loss {results.name!r} of {results.path} has groups, but compare takes losses "
                    "without. Name another, or add this one without group_by to the task and `lca "
                    "run` it."
                )
            if (results.path.resolve(), results.name) in seen:
                raise InputError(
                    f"{results.path} is given twice under label {label!r}; a repeat must be a "
                    "different run."
                )
            seen.add((results.path.resolve(), results.name))
    return listed


def _figures(results: LossResults) -> Figures[float]:
    """Return the summary of a loss, which has no groups."""
    return cast("Figures[float]", summary(results))


def _label(tensor: Part[float], by: str | int) -> str:
    """Return the layer of a row of a summary."""
    moved = tensor["kind"] == "buffer" and tensor["allocated"] != 0
    return label_of(tensor["name"], by, [tensor["name"]] if moved else ())


def _layer_sums(one: Figures[float], layers: list[str], by: str | int) -> list[float]:
    parts: dict[str, list[float]] = {}
    for tensor in one["tensors"]:
        parts.setdefault(_label(tensor, by), []).append(tensor["allocated"])
    return [math.fsum(parts[layer]) if layer in parts else math.nan for layer in layers]


def _path_bands(listed: dict[str, list[LossResults]], layers: list[str], by: str | int) -> Numbers:
    """Return how much other paths change the sums of layers, (label, layer): the mean over the runs
    that measured it; NaN where none did.
    """
    bands = np.full((len(listed), len(layers)), np.nan)
    for row, several in enumerate(listed.values()):
        bands_of_runs = [
            band for results in several if (band := _path_band(results, by)) is not None
        ]
        for column, layer in enumerate(layers):
            of_layer = [band[layer] for band in bands_of_runs if layer in band]
            bands[row, column] = np.mean(of_layer) if of_layer else np.nan
    return bands


def _path_band(results: LossResults, by: str | int) -> dict[str, float] | None:
    """Return how much other paths change the sum of each layer of a run, by its name."""
    members: dict[str, list[int]] = {}
    for position, tensor in enumerate(_figures(results)["tensors"]):
        members.setdefault(_label(tensor, by), []).append(position)
    bands = path_bands(results, list(members.values()))
    return None if bands is None else dict(zip(members, bands.tolist(), strict=True))


def _within_paths(difference: Numbers, path: Numbers) -> list[str]:
    """Count the differences between labels that other paths could produce as well."""
    either = np.nan_to_num(path) + np.nan_to_num(path[:1])
    compared = ~np.isnan(difference[1:]) & (either[1:] > 0)
    within = int((np.abs(difference[1:]) <= either[1:])[compared].sum())
    if not within:
        return []
    return [
        f"{within:,} of {count(int(compared.sum()), 'difference')} to the first label are no larger "
        "than the change by other paths between checkpoints (± path)."
    ]


def _unlike(summaries: list[tuple[str, Figures[float]]], by: str | int) -> list[str]:
    """Name the layers that have different numbers of parameters in different runs."""
    sizes: dict[str, dict[int, str]] = {}
    for label, one in summaries:
        counts: dict[str, int] = {}
        for tensor in one["tensors"]:
            layer = _label(tensor, by)
            counts[layer] = counts.get(layer, 0) + tensor["parameters"]
        for layer, number in counts.items():
            sizes.setdefault(layer, {}).setdefault(number, label)
    unlike = [
        f"{layer or 'the whole network'} "
        f"({' and '.join(f'{number:,} in {label}' for number, label in of.items())})"
        for layer, of in sizes.items()
        if len(of) > 1
    ]
    return (
        [f"layers of the same name with different numbers of parameters: {', '.join(unlike[:6])}."]
        if unlike
        else []
    )


def _left_out(results: LossResults) -> list[str]:
    patterns = results.manifest.settings["tensors"]
    rest = ["tensors that `--tensors` excludes are in no layer."] if patterns else []
    sampled = results.manifest.sampled
    if sampled is not None:
        rest.append(
            f"sums are estimates from a random part of the segments (--segments {sampled}), which "
            "also makes them differ from those of other runs."
        )
    return [f"{results.path}: {word}" for word in [*unfinished(results), *rest]]


def _without_shares(listed: dict[str, list[LossResults]]) -> list[str]:
    """Name the runs that do not keep how many parameters help; nothing where all or none do."""
    every = [results for several in listed.values() for results in several]
    without = [str(results.path) for results in every if not results.holds("statistics")]
    if len(without) in (0, len(every)):
        return []
    return [
        f"Shares of parameters that help need --keep statistics in every run; {few(without)} "
        f"{'keeps' if len(without) == 1 else 'keep'} less."
    ]


def _about(
    listed: dict[str, list[LossResults]], left_out: list[str], beyond: list[str]
) -> dict[str, Any]:
    every = [
        about(results, "compare", left_out, beyond)
        for several in listed.values()
        for results in several
    ]
    joined = {
        name: ", ".join(dict.fromkeys(entry[name] for entry in every))
        for name in ("run", "loss", "split")
    }
    modes = dict.fromkeys(str(one["norm_stats"]) for one in every if "norm_stats" in one)
    return every[0] | joined | ({"norm_stats": ", ".join(modes)} if modes else {})


def _of_layers(
    total: Numbers, over: Repeats, confidence: float
) -> dict[str, tuple[tuple[str, ...], Any, str, str]]:
    """Return dims, values, units and meaning of each variable by label and layer, from `total`
    (label, layer, run).
    """
    both = ("label", "layer")
    certain = f"of the {100 * confidence:g} % t interval of the mean"
    first = "paired t-test or Welch's test (`paired`) against the first label"
    return {
        "total": ((*both, "run"), total, "loss", "allocated by the layer"),
        "mean": (both, over.mean, "loss", "allocated by the layer, mean over runs"),
        "low": (both, over.low, "loss", f"lower end {certain}"),
        "high": (both, over.high, "loss", f"upper end {certain}"),
        "p": (both, over.p, "probability", "t-test of the mean against 0"),
        "p_holm": (
            both,
            holm(over.p),
            "probability",
            "t-test of the mean against 0, corrected by Holm",
        ),
        "difference": (
            both,
            over.mean - over.mean[:1],
            "loss",
            "mean minus that of the first label",
        ),
        "p_difference": (both, over.p_difference, "probability", first),
        "p_difference_holm": (
            both,
            holm(over.p_difference),
            "probability",
            f"{first}, corrected by Holm",
        ),
    }


def _of_labels(
    head: dict[str, Repeats], confidence: float
) -> dict[str, tuple[tuple[str, ...], Any, str, str]]:
    """Return dims, values, units and meaning of each variable by label."""
    label, certain = ("label",), f"of the {100 * confidence:g} % t interval"
    variables: dict[str, tuple[tuple[str, ...], Any, str, str]] = {
        "loss_change": (
            label,
            head["loss_change"].mean,
            "loss",
            "change of the loss, mean over runs",
        ),
        "p_loss_end": (
            label,
            head["loss_end"].p_difference,
            "probability",
            "last loss, paired t-test or Welch's test (`paired`) against the first label",
        ),
    }
    for name, units, text in (
        ("helping", "share", "parameters × segments that helped"),
        ("loss_end", "loss", "last loss"),
    ):
        if name not in head:
            continue
        variables[name] = (label, head[name].mean, units, f"{text}, mean over runs")
        variables[f"{name}_low"] = (label, head[name].low, units, f"{text}, lower end {certain}")
        variables[f"{name}_high"] = (label, head[name].high, units, f"{text}, upper end {certain}")
    return variables


@dataclass(frozen=True)
class Repeats:
    """Means over repeats, the ends of their intervals, p against 0, and p of the difference to the
    first label.
    """

    mean: Numbers
    low: Numbers
    high: Numbers
    p: Numbers
    p_difference: Numbers


def padded(rows: Sequence[Sequence[Any]]) -> Numbers:
    """Return numbers, or lists of numbers, per label and run as (label, …, run), with NaN where a
    label has fewer runs.
    """
    most, shape = max(map(len, rows)), np.shape(rows[0][0])
    array = np.full((len(rows), *shape, most), np.nan)
    for label, row in enumerate(rows):
        for run, values in enumerate(row):
            array[label, ..., run] = values
    return array


def repeats(
    values: Numbers, confidence: float, pairs: Sequence[list[int] | str | None] | None = None
) -> Repeats:
    """Return Student's interval and the tests over the last axis.

    With n numbers, mean m and standard error e = s / √n: m ± t(n − 1) · e; t = m / e with n − 1
    degrees of freedom; against the first label (m₁, e₁, n₁), t = (m − m₁) / √(e² + e₁²) with (e² +
    e₁²)² / (e⁴ / (n − 1) + e₁⁴ / (n₁ − 1)) degrees (Welch 1947). Of pairs, the test against 0 of
    their n differences, with n − 1 degrees.

    Args:
        values: (label, …, run), NaN where there is no run.
        confidence: of the interval.
        pairs: for each label the runs of the first label its runs are paired with, "apart" for
            Welch's test, None for no test; all apart where None.

    Returns:
        Arrays (label, …); NaN where n < 2 or nothing varies.
    """
    is_number = ~np.isnan(values)
    with np.errstate(all="ignore"):  # undefined values become NaN
        n = is_number.sum(axis=-1).astype(float)
        mean = np.where(is_number, values, 0.0).sum(axis=-1) / n
        spread = np.where(is_number, values - mean[..., None], 0.0)
        error = np.sqrt((spread**2).sum(axis=-1) / (n - 1) / n)
        error = np.where(error <= _ROUNDING * abs(mean), 0.0, error)
        half = scipy.stats.t.ppf((1 + confidence) / 2, n - 1) * error
        p = 2 * scipy.stats.t.sf(abs(mean) / error, n - 1)
        square = error**2 + error[:1] ** 2
        degrees = square**2 / (error**4 / (n - 1) + error[:1] ** 4 / (n[:1] - 1))
        p_difference = 2 * scipy.stats.t.sf(abs(mean - mean[:1]) / np.sqrt(square), degrees)
    for label, order in enumerate(pairs or []):
        if isinstance(order, list):
            p_difference[label], square[label] = _of_pairs(
                values[label, ..., : len(order)] - values[0][..., order]
            )
        elif order is None:
            p_difference[label] = np.nan
    p_difference[0] = np.nan  # a label does not differ from itself
    p = np.where(error > 0, p, np.nan)
    return Repeats(mean, mean - half, mean + half, p, np.where(square > 0, p_difference, np.nan))


def _of_pairs(differences: Numbers) -> tuple[Numbers, Numbers]:
    """Return p of the mean of differences over the last axis, and its squared error; NaN means no
    pair.
    """
    is_number = ~np.isnan(differences)
    with np.errstate(all="ignore"):
        n = is_number.sum(axis=-1).astype(float)
        mean = np.where(is_number, differences, 0.0).sum(axis=-1) / n
        spread = np.where(is_number, differences - mean[..., None], 0.0)
        error = np.sqrt((spread**2).sum(axis=-1) / (n - 1) / n)
        error = np.where(error <= _ROUNDING * abs(mean), 0.0, error)
        return 2 * scipy.stats.t.sf(abs(mean) / error, n - 1), error**2


def holm(p: Numbers) -> Numbers:
    """Correct all p that are not NaN by Holm's step-down method: the k-th smallest of m times m − k
    + 1, never falling.

    >>> holm(np.array([0.01, np.nan, 0.04, 0.03])).tolist()
    [0.03, nan, 0.06, 0.06]
    """
    flat = p.ravel()
    order = np.argsort(flat, kind="stable")[: np.count_nonzero(~np.isnan(flat))]
    corrected = np.full_like(flat, np.nan)
    corrected[order] = np.minimum(
        1.0, np.maximum.accumulate(flat[order] * np.arange(len(order), 0, -1))
    )
    return corrected.reshape(p.shape)
