"""Runs beside each other, against scipy's own tests and Holm's procedure as it was published."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lca_posthoc import Loss, Recorder, Task, open_run, run
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.findings import compare, summary
from lca_posthoc.findings.compare import holm, padded, repeats

from ..helpers.cli import contents, document, lca, marker, refused, says

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.filterwarnings("error", "ignore::lca_posthoc.errors.LCAWarning")

# --- statistics -----------------------------------------------------------------------------------


def rejected(p: list[float], level: float) -> set[int]:
    """Holm's procedure: smallest first, stop at the first of the remaining m that is above level /
    m.
    """
    found, left = set[int](), sorted(range(len(p)), key=p.__getitem__)
    while left and p[left[0]] <= level / len(left) * (1 + 1e-12):
        found.add(left.pop(0))
    return found


def slow_holm(p: list[float]) -> list[float]:
    """The smallest level at which each would be rejected; these are multiples of the p."""
    levels = sorted({each * factor for each in p for factor in range(1, len(p) + 1)})
    return [
        next((level for level in levels if level <= 1 and at in rejected(p, level)), 1.0)
        for at in range(len(p))
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.02, 0.04]), max_size=7), st.integers(0, 3)
)
def test_the_correction_is_the_smallest_level_of_holms_procedure(
    p: list[float], missing: int
) -> None:
    made = np.array([*p, *[math.nan] * missing])
    found = holm(np.random.default_rng(0).permutation(made))
    order = np.random.default_rng(0).permutation(len(made))
    back = np.empty(len(made))
    back[order] = found
    assert back[: len(p)].tolist() == pytest.approx(slow_holm(p), rel=1e-9, abs=1e-300)
    assert np.isnan(back[len(p) :]).all()


def test_the_correction_is_over_everything_there_is() -> None:
    p = np.array([[0.01, 0.5], [np.nan, 0.02]])
    assert holm(p)[[0, 0, 1], [0, 1, 1]].tolist() == pytest.approx([0.03, 0.5, 0.04])


def sample(seed: int, sizes: tuple[int, ...], layers: int = 3) -> list[Array]:
    """Per label (run, layer), of means and spreads of their own."""
    generator = np.random.default_rng(seed)
    return [
        generator.normal(
            generator.normal(size=layers), 10 ** generator.uniform(-3, 1, layers), (size, layers)
        )
        for size in sizes
    ]


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("sizes", [(2, 2), (5, 3), (10, 2, 4), (3, 1), (1, 4), (1, 1)])
def test_intervals_and_p_are_scipys(sizes: tuple[int, ...], confidence: float) -> None:
    values = sample(sum(sizes), sizes)
    found = repeats(padded([list(each) for each in values]), confidence)
    for label, one in enumerate(values):
        for layer in range(3):
            column, at = one[:, layer], (label, layer)
            assert found.mean[at] == pytest.approx(column.mean())
            if len(column) < 2:
                assert np.isnan([found.low[at], found.high[at], found.p[at]]).all()
            else:
                interval = stats.t.interval(
                    confidence, len(column) - 1, column.mean(), stats.sem(column)
                )
                assert (found.low[at], found.high[at]) == pytest.approx(interval)
                assert found.p[at] == pytest.approx(stats.ttest_1samp(column, 0).pvalue)
            first = values[0][:, layer]
            if not label or min(len(first), len(column)) < 2:
                assert np.isnan(found.p_difference[at])
            else:
                assert found.p_difference[at] == pytest.approx(
                    stats.ttest_ind(column, first, equal_var=False).pvalue
                )


def test_a_layer_some_runs_lack_is_tested_on_those_that_have_it() -> None:
    values = sample(9, (5, 4), 1)
    holes = [[*values[0], [np.nan]], [[np.nan], *values[1], [np.nan], [np.nan]]]
    found, plain = (
        repeats(padded(holes), 0.9),
        repeats(padded([list(each) for each in values]), 0.9),
    )
    for name in ("mean", "low", "high", "p", "p_difference"):
        assert np.array_equal(getattr(found, name), getattr(plain, name), equal_nan=True), name


NO_SPREAD: dict[str, tuple[list[list[float]], list[bool], list[bool]]] = {
    # values per label; is there a p against 0, and one of the difference
    "zeros": ([[0.0, 0.0, 0.0], [0.0, 0.0]], [False, False], [False, False]),
    "a number that sums inexactly": ([[0.1, 0.1, 0.1], [0.1] * 7], [False, False], [False, False]),
    "numbers that differ by rounding": (
        [[0.3, 0.1 + 0.2], [0.5, 0.5]],
        [False, False],
        [False, False],
    ),
    "on one side": ([[0.1, 0.1, 0.1], [0.2, 0.4]], [False, True], [False, True]),
    "on the other": ([[0.2, 0.4], [0.1, 0.1, 0.1]], [True, False], [False, True]),
    "a mean of zero": ([[-1.0, 1.0], [-1.0, 1.0]], [True, True], [False, True]),
    "not finite": ([[math.inf, 1.0], [1.0, 2.0]], [False, True], [False, False]),
}


@pytest.mark.parametrize("case", NO_SPREAD)
def test_what_does_not_vary_has_no_p_and_is_no_failure(case: str) -> None:
    values, against_zero, of_difference = NO_SPREAD[case]
    found = repeats(padded(values), 0.95)
    assert (~np.isnan(found.p)).tolist() == against_zero
    assert (~np.isnan(found.p_difference)).tolist() == of_difference
    if case == "zeros":
        assert found.low.tolist() == found.mean.tolist() == found.high.tolist() == [0, 0]


# --- runs -----------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], nn.Module]] = {
    "shallow": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Identity(), nn.Linear(5, 3)
    ),
    "deep": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)
    ),
}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(100)
    return torch.randn(24, 6), torch.arange(24) % 3


def replay(
    root: Path, kind: str, seed: int, steps: int, rate: float = 0.3, still: int = 0, **asked: Any
) -> Path:
    """A training of so many steps, the first `still` of which do not move, and its run."""
    inputs, targets = data()
    torch.manual_seed(seed)
    model = KINDS[kind]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    place = root / f"{kind}-{seed}"
    with Recorder(place, model) as recorder:
        for step in range(steps + 1):
            recorder.save(step)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            if step >= still:
                optimizer.step()
    losses = {
        "train": Loss(F.cross_entropy, on="train"),
        "per_class": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets),
    }
    task = Task(KINDS[kind], {"train": (inputs, targets)}, losses)
    asked = {"keep": "statistics", **asked}
    return run(place, task, losses=["all"], cluster="inline", span=2, **asked).path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shallow runs of four steps and two deep ones of three."""
    place = tmp_path_factory.mktemp("compare")
    for kind, seed, steps in (
        ("shallow", 1, 4),
        ("shallow", 2, 4),
        ("shallow", 3, 4),
        ("deep", 1, 3),
        ("deep", 2, 3),
    ):
        replay(place, kind, seed, steps)
    return place


@pytest.fixture
def runs(root: Path) -> dict[str, list[Any]]:
    return {
        kind: [open_run(path)["train"] for path in sorted(root.glob(f"{kind}-*.lca"))]
        for kind in KINDS
    }


@pytest.fixture
def found(runs: dict[str, list[Any]]) -> xr.Dataset:
    return compare(runs)


def test_layers_are_those_of_all_runs_and_sums_those_of_their_tensors(
    runs: dict[str, list[Any]], found: xr.Dataset
) -> None:
    # running statistics are no part of a layer
    assert found["layer"].values.tolist() == [
        "0",
        "1",
        "4",
        "1 buffer",
        "2",
    ]
    assert found["label"].values.tolist() == ["shallow", "deep"]
    assert dict(found.sizes) == {"label": 2, "layer": 5, "run": 3}
    for label, several in runs.items():
        for layer in found["layer"].values:
            for at in range(3):
                value = float(found["total"].sel(label=label, layer=layer)[at])
                if at >= len(several):
                    assert math.isnan(value)
                    continue
                tensors = several[at].tensors
                pairs = zip(tensors["tensor"].values, tensors["kind"].values, strict=True)
                mine = [
                    f"{name.partition('.')[0]}{' buffer' * (kind == 'buffer')}" == layer
                    for name, kind in pairs
                ]
                if any(mine):
                    assert value == pytest.approx(
                        float(tensors["allocated"].values[:, mine].sum()), rel=1e-12
                    )
                else:
                    assert math.isnan(value)
    assert (
        float(found["total"].sel(label="deep", layer="1")[0])
        != found["total"].sel(label="shallow", layer="1")[0]
    )
    assert found["path"].values.tolist() == [
        [str(each.path) for each in runs["shallow"]],
        [*(str(each.path) for each in runs["deep"]), ""],
    ]


def test_the_statistics_are_over_the_runs_of_a_label(
    runs: dict[str, list[Any]], found: xr.Dataset
) -> None:
    totals = {label: found["total"].sel(label=label).values for label in runs}
    for layer in range(5):
        shallow, deep = (
            each[layer][~np.isnan(each[layer])] for each in (totals["shallow"], totals["deep"])
        )
        for label, mine in (("shallow", shallow), ("deep", deep)):
            of = found.sel(label=label).isel(layer=layer)
            # a layer the label lacks, or one without parameters
            if not len(mine) or not mine.any():
                assert np.isnan([of["p"], of["p_holm"]]).all()
                continue
            assert of["mean"] == pytest.approx(mine.mean())
            assert of["p"] == pytest.approx(stats.ttest_1samp(mine, 0).pvalue)
            wanted = stats.t.interval(0.95, len(mine) - 1, mine.mean(), stats.sem(mine))
            assert (float(of["low"]), float(of["high"])) == pytest.approx(wanted)
        difference = found.sel(label="deep").isel(layer=layer)
        if len(shallow) and len(deep):
            assert difference["difference"] == pytest.approx(deep.mean() - shallow.mean())
            assert difference["p_difference"] == pytest.approx(
                stats.ttest_ind(deep, shallow, equal_var=False).pvalue
            )
        else:
            assert np.isnan([difference["difference"], difference["p_difference"]]).all()
    for name in ("p", "p_difference"):
        there = ~np.isnan(found[name].values)
        assert there.sum() == {"p": 7, "p_difference": 2}[name]
        assert found[f"{name}_holm"].values[there].tolist() == pytest.approx(
            slow_holm(found[name].values[there].tolist())
        )
        assert np.isnan(found[f"{name}_holm"].values[~there]).all()
    assert (found["difference"].sel(label="shallow").dropna("layer") == 0).all()


def test_headline_figures_are_means_of_the_summaries(
    runs: dict[str, list[Any]], found: xr.Dataset
) -> None:
    figures = {label: [summary(each) for each in several] for label, several in runs.items()}
    for label, several in figures.items():
        of = found.sel(label=label)
        for name in ("helping", "loss_end", "loss_change"):
            assert of[name] == pytest.approx(np.mean([each[name] for each in several]))
        for name in ("helping", "loss_end"):
            mine = [each[name] for each in several]
            wanted = stats.t.interval(0.95, len(mine) - 1, np.mean(mine), stats.sem(mine))
            assert (float(of[f"{name}_low"]), float(of[f"{name}_high"])) == pytest.approx(wanted)
        assert of["runs"] == len(several)
    ends = [[each["loss_end"] for each in figures[label]] for label in ("deep", "shallow")]
    wanted = stats.ttest_ind(*ends, equal_var=False).pvalue
    assert found["p_loss_end"].values.tolist() == pytest.approx([math.nan, wanted], nan_ok=True)


def test_a_result_says_what_it_is_of(found: xr.Dataset, runs: dict[str, list[Any]]) -> None:
    paths = ", ".join(str(each.path) for several in runs.values() for each in several)
    wanted = {
        "finding": "compare",
        "run": paths,
        "loss": "train",
        "split": "train",
        "left_out": "",
        "by": "module",
    }
    assert {name: found.attrs[name] for name in wanted} == wanted
    assert all({"units", "long_name"} <= set(found[name].attrs) for name in found)


def test_one_run_is_a_list_of_one_and_has_no_intervals(runs: dict[str, list[Any]]) -> None:
    alone, listed = compare({"a": runs["shallow"][0]}), compare({"a": runs["shallow"][:1]})
    assert alone.identical(listed)
    assert alone["mean"].values.tolist() == alone["total"].values[..., 0].tolist()
    for name in ("low", "high", "p", "p_holm", "p_difference", "p_difference_holm"):
        assert np.isnan(alone[name].values).all(), name


@pytest.mark.parametrize("by", ["tensor", 1, "module"])
def test_layers_of_any_division_sum_to_what_was_allocated(
    runs: dict[str, list[Any]], by: str | int
) -> None:
    found = compare(runs, by=by)
    wanted = [[summary(each)["allocated"] for each in several] for several in runs.values()]
    sums = found["total"].sum("layer").values
    assert [row[: len(mine)].tolist() for row, mine in zip(sums, wanted, strict=True)] == [
        pytest.approx(mine, rel=1e-12) for mine in wanted
    ]


def test_losses_of_one_run_can_be_compared(root: Path) -> None:
    """The same run under two labels; a label is free text."""
    train = open_run(root / "deep-1.lca")["train"]
    label = "\x1b[31m[bold]a=b\n"
    found = compare({label: train, "": train})
    assert found["label"].values.tolist() == [label, ""]
    assert (found["difference"] == 0).all()


def test_layers_of_one_name_and_other_sizes_are_named(runs: dict[str, list[Any]]) -> None:
    assert "numbers of parameters" not in compare(runs).attrs["left_out"]
    assert "1 (" not in compare(runs, by=1).attrs["left_out"]
    said = compare(runs, by=0).attrs["left_out"]
    sizes = {kind: summary(several[0])["parameters"] for kind, several in runs.items()}
    assert (
        f"the whole network ({sizes['shallow']:,} in shallow and {sizes['deep']:,} in deep)" in said
    )


def test_unfinished_runs_are_compared_as_far_as_they_are_and_named(
    root: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(root / "shallow-1.lca", tmp_path / "part.lca"))
    marker(place, "train", 1).unlink()
    part, whole = open_run(place)["train"], open_run(root / "shallow-2.lca")["train"]
    found = compare({"part": part, "whole": whole})
    says(found.attrs["left_out"], f"{place}: 2 of 4 segments", "lca run")
    assert str(whole.path) not in found.attrs["left_out"]
    assert found["loss_end"].values[0] == summary(part)["loss_end"]
    marker(place, "train", 0).unlink()
    with pytest.raises(LCAError, match="no finished segment"):
        compare({"part": open_run(place)["train"]})


def test_tensors_that_are_not_kept_are_in_no_layer_and_said_to_be(tmp_path: Path) -> None:
    kept = open_run(replay(tmp_path, "deep", 5, 2, tensors=["0.*"]))["train"]
    found = compare({"kept": kept})
    assert found["layer"].values.tolist() == ["0"]
    says(found.attrs["left_out"], "--tensors", "in no layer")


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nothing": (lambda deep: compare({}), "nothing to compare"),
    "no mapping": (lambda deep: compare([deep["train"]]), "nothing to compare"),  # type: ignore[arg-type]
    "an empty label": (lambda deep: compare({"a": []}), "label 'a' needs one or more results"),
    "a run in place of a loss": (
        lambda deep: compare({"a": [deep]}),
        "label 'a' needs one or more results",
    ),
    "a number for a label": (lambda deep: compare({1: deep["train"]}), "label 1 needs"),  # type: ignore[dict-item]
    "groups": (
        lambda deep: compare({"a": deep["per_class"]}),
        "loss 'per_class' of; has groups; without group_by",
    ),
    "twice": (
        lambda deep: compare({"a": [deep["train"]] * 2}),
        "deep-1.lca is given twice under label 'a'",
    ),
    "certainty": (
        lambda deep: compare({"a": deep["train"]}, confidence=1.0),
        "between 0 and 1, got 1.0",
    ),
    "no number": (
        lambda deep: compare({"a": deep["train"]}, confidence=math.nan),
        "between 0 and 1, got nan",
    ),
    "layers by what": (lambda deep: compare({"a": deep["train"]}, by="colour"), "'colour'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(root: Path, case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        call(open_run(root / "deep-1.lca"))
    says(str(caught.value), *words.split("; "))


# --- lca compare ----------------------------------------------------------------------------------


def test_the_document_holds_the_finding(root: Path, found: xr.Dataset) -> None:
    result = lca(
        "compare",
        f"shallow={root}/shallow-*.lca",
        *(f"deep={root}/deep-{seed}.lca" for seed in (1, 2)),
        "--json",
    )
    made = document(result)
    assert (result.stderr, made["schema"], made["loss"], made["by"], made["left_out"]) == (
        "",
        1,
        "train",
        "module",
        "",
    )
    assert list(made["labels"]) == ["shallow", "deep"]
    for label, of in made["labels"].items():
        wanted = found.sel(label=label)
        assert [of["runs"], *of["paths"]] == [
            int(wanted["runs"]),
            *(each for each in wanted["path"].values if each),
        ]
        for name in (
            "helping",
            "helping_low",
            "loss_end",
            "loss_end_high",
            "loss_change",
            "p_loss_end",
        ):
            assert of[name] == plain(wanted[name])
        assert list(of["layers"]) == found["layer"].values.tolist()
        for layer, numbers in of["layers"].items():
            one = wanted.sel(layer=layer)
            assert numbers.pop("totals") == [
                plain(each) for each in one["total"].values[: of["runs"]]
            ]
            assert numbers == {name: plain(one[name]) for name in numbers}
            assert len(numbers) == 9


def plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def test_the_table_has_layers_beside_each_other(root: Path, found: xr.Dataset) -> None:
    before = contents(root)
    result = lca("compare", f"shallow={root}/shallow-*.lca", f"deep={root}/deep-*.lca")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["runs", "3", "2"] in lines
    assert ["layer", "shallow", "p", "deep", "p", "difference", "p"] in lines
    of = found.sel(layer="0")
    (row,) = (line for line in lines if line[:1] == ["0"])
    wanted = []
    for label in ("shallow", "deep"):
        one = of.sel(label=label)
        wanted += [
            f"{float(one['mean']):+.4f}",
            f"[{float(one['low']):+.4f},",
            f"{float(one['high']):+.4f}]",
        ]
        wanted += [f"{float(one['p_holm']):.2g}"]
    wanted += [f"{float(one['difference']):+.4f}", f"{float(one['p_difference_holm']):.2g}"]
    assert row[1:] == wanted
    (lacking,) = (line for line in lines if line[:1] == ["2"])
    assert lacking[1:3] == ["–", "–"]
    says(result.stdout, "95 % t interval", "Welch", "Holm")
    assert contents(root) == before


def test_runs_without_labels_are_called_by_their_names_and_have_no_intervals(root: Path) -> None:
    result = lca("compare", root / "shallow-1.lca", root / "shallow-2.lca", "--by", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["layer", "shallow-1", "shallow-2", "difference"] in lines
    assert "[" not in result.stdout
    assert "p" not in [word for line in lines for word in line]


def test_labels_and_paths_cannot_steer_a_terminal_or_be_mistaken(
    root: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(root / "deep-1.lca", tmp_path / "a=b [red].lca"))
    result = lca("compare", odd, f"\x1b[31m[bold]x={odd}")
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.output
    says(result.stdout, "a=b [red]", "?[31m[bold]x")
    assert list(document(lca("compare", odd, f"x={odd}", "--json"))["labels"]) == ["a=b [red]", "x"]


def test_a_second_run_of_the_same_name_is_called_by_its_path(root: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root / "deep-1.lca", tmp_path / "deep-1.lca"))
    made = document(lca("compare", root / "deep-1.lca", other, "--json"))
    assert list(made["labels"]) == ["deep-1", str(other)]
    refused(
        lca("compare", root / "deep-1.lca", other, other),
        "already are runs labelled",
        f"Write LABEL={other}",
    )


def test_an_unfinished_run_is_a_note(root: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(root / "shallow-1.lca", tmp_path / "part.lca"))
    marker(place, "train", 1).unlink()
    result = lca("compare", place, root / "shallow-2.lca", "--json")
    assert document(result)["left_out"] in result.stderr
    assert result.stderr.startswith("note: ")
    says(result.stderr, "part.lca: 2 of 4 segments")


ASKED_WRONGLY: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "Missing argument"),
    "no run": (("{root}/nothing.lca",), "nothing.lca is not a run directory"),
    "a pattern of nothing": (("a={root}/nothing-*.lca",), "nothing-*.lca is not a run directory"),
    "no label": (("={root}/deep-1.lca",), "LABEL=RUN needs a label and a run"),
    "a label alone": (("a=",), "LABEL=RUN needs a label and a run, got 'a='"),
    "a loss that is none": (
        ("{root}/deep-1.lca", "--loss", "no"),
        "has no loss 'no'; it has 'train', 'per_class'; --loss",
    ),
    "groups": (("{root}/deep-1.lca", "--loss", "per_class"), "has groups"),
    "the same run twice": (
        ("a={root}/deep-1.lca", "a={root}/deep-*.lca"),
        "given twice under label 'a'",
    ),
    "layers by what": (("{root}/deep-1.lca", "--by", "colour"), "'colour'"),
    "layers of depth below": (("{root}/deep-1.lca", "--by", "-1"), "'-1'"),
    "certainty": (("{root}/deep-1.lca", "--confidence", "95"), "between 0 and 1, got 95.0"),
    "no number": (("{root}/deep-1.lca", "--confidence", "high"), "'high' is not a valid float"),
}


@pytest.mark.parametrize("case", ASKED_WRONGLY)
def test_what_cannot_be_asked_exits_with_two(root: Path, case: str) -> None:
    arguments, words = ASKED_WRONGLY[case]
    refused(lca("compare", *(each.format(root=root) for each in arguments)), *words.split("; "))


def test_a_run_without_losses_is_refused(root: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(root / "deep-1.lca", tmp_path / "none.lca"))
    for name in ("train", "per_class"):
        assert lca("remove", place, "--loss", name).exit_code == 0
    refused(lca("compare", place), "has no losses")
    assert json.loads((place / "run.json").read_text())["losses"] == {}


# --- which runs are repeats, and which are pairs --------------------------------------------------


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of three seeds from the same initial weights, two learning rates; and seed 1 of the
    first measured in other ways.
    """
    place = tmp_path_factory.mktemp("arms")
    for arm, rate in (("slow", 0.1), ("fast", 0.3)):
        for seed in (1, 2, 3):
            replay(place / arm, "shallow", seed, 3, rate=rate)
    for name, asked in MEASURED.items():
        again(place / "slow" / "shallow-1", place / f"{name}.lca", **asked)
    shutil.copytree(place / "slow" / "shallow-1.lca", place / "copy.lca")
    return place


MEASURED: dict[str, dict[str, Any]] = {
    "rule": {"rule": "trapezoid"},
    "parameters": {"keep": "parameters"},
    "sums": {"keep": "tensors"},
    "batch": {"norm_stats": "batch", "batch_size": 12},
    "precise": {"precision": "float64"},
    "part": {"steps": "0:2"},
    "few": {"subset": ["train=0:12"]},
    "other": {"twice": True},
}
DIFFERS = {
    "rule": "Runs differ in rule: simpson under a; trapezoid under b",
    "parameters": "",
    "copy": "",
    "batch": "Runs differ in normalisation (--norm-stats): running under a; batch under b",
    "precise": "Runs differ in precision: float32 under a; float64 under b",
    "part": "Runs differ in steps: 0 to 3 (3 segments) under a; 0 to 2 (2 segments) under b",
    "few": "Runs differ in examples: 24 of 24 under a; 12 of 24 under b",
    "other": "Runs differ in the loss itself: at step 0, on the same weights, it is ",
}


def again(checkpoints: Path, out: Path, twice: bool = False, **asked: Any) -> None:
    """The same training, measured in another way; `twice` measures twice the loss under the same
    name.
    """

    def doubled(model: nn.Module, batch: Any) -> torch.Tensor:
        return 2 * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    loss = Loss(call=doubled, on="train") if twice else Loss(F.cross_entropy, on="train")
    task = Task(KINDS["shallow"], {"train": data()}, {"train": loss})
    run(checkpoints, task, out=out, cluster="inline", span=2, **{"keep": "statistics", **asked})


def trained(arms: Path, *names: str) -> list[Any]:
    return [open_run(arms / f"{name}.lca")["train"] for name in names]


@pytest.mark.parametrize("beside", ["nothing", "parameters", "slow/shallow-2"])
def test_shares_that_not_every_run_keeps_are_left_out(arms: Path, beside: str) -> None:
    """Of several runs only a mixture says so: where none keeps them nobody misses them."""
    labels = {"sums": trained(arms, "sums")}
    if beside != "nothing":
        labels[beside] = trained(arms, beside)
    paths = [str(results.path) for several in labels.values() for results in several]
    found = compare(labels)
    assert not [name for name in found.variables if str(name).startswith("helping")]
    assert {"mean", "loss_end", "loss_end_low", "loss_change", "p_loss_end"} <= set(found.data_vars)
    mixed = beside != "nothing"
    assert ("need --keep statistics in every run; " in found.attrs["left_out"]) == mixed
    assert ("sums.lca keeps less." in found.attrs["left_out"]) == mixed
    if beside == "parameters":
        full = compare({"sums": trained(arms, "slow/shallow-1"), beside: labels[beside]})
        assert set(full.data_vars) - set(found.data_vars) == {
            *("helping", "helping_low", "helping_high")
        }
        xr.testing.assert_allclose(found["mean"], full["mean"], rtol=1e-5)
    printed = lca("compare", *paths)
    assert printed.exit_code == 0, printed.output
    assert "helping" not in printed.stdout
    assert "nan" not in printed.stdout
    for of in document(lca("compare", *paths, "--json"))["labels"].values():
        assert not [name for name in of if name.startswith("helping")]
        assert math.isfinite(of["loss_end"])


SLOW, FAST = ([f"{arm}/shallow-{seed}" for seed in (1, 2, 3)] for arm in ("slow", "fast"))


@pytest.mark.parametrize("name", DIFFERS)
def test_one_training_measured_again_is_no_repeat_and_what_differs_is_named(
    arms: Path, name: str
) -> None:
    under_one = compare({"a": trained(arms, *SLOW, name)})
    without = compare({"a": trained(arms, *SLOW)})
    for variable in ("mean", "low", "high", "p", "p_holm", "helping", "loss_end_low"):
        assert np.array_equal(under_one[variable], without[variable], equal_nan=True), variable
    assert (int(under_one["runs"][0]), int(under_one["trainings"][0])) == (4, 3)
    assert under_one["total"].sizes["run"] == 4
    assert np.isfinite(under_one["total"].values[..., 3]).any()
    shared = "2 of 3 checkpoints are the same" if name == "part" else "the same checkpoints"
    says(
        under_one.attrs["notes"],
        f"{name}.lca",
        "shallow-1.lca are of one training",
        shared,
        "counts once",
    )
    beside = compare({"a": trained(arms, SLOW[0]), "b": trained(arms, name)})
    says(beside.attrs["notes"], "'b' and 'a' share trainings", DIFFERS[name])
    assert ("Runs differ" in beside.attrs["notes"]) == bool(DIFFERS[name])


def test_one_training_given_twice_under_two_names_has_no_p(arms: Path) -> None:
    found = compare({"a": trained(arms, SLOW[0], "copy")})
    for name in ("low", "high", "p", "p_holm"):
        assert np.isnan(found[name].values).all(), name
    assert found["trainings"].values.tolist() == [1]


@pytest.mark.parametrize("paired", [None, True])
def test_runs_that_begin_from_the_same_checkpoint_are_tested_in_pairs(
    arms: Path, paired: bool | None
) -> None:
    order = [FAST[2], FAST[0], FAST[1]] if paired is None else FAST
    found = compare({"slow": trained(arms, *SLOW), "fast": trained(arms, *order)}, paired=paired)
    slow, fast = (found["total"].sel(label=label).values for label in ("slow", "fast"))
    fast = fast[:, [1, 2, 0]] if paired is None else fast
    for layer in range(found.sizes["layer"]):
        if not (fast[layer] - slow[layer]).any():
            continue
        one = found.sel(label="fast").isel(layer=layer)
        assert one["p_difference"] == pytest.approx(
            stats.ttest_rel(fast[layer], slow[layer]).pvalue
        )
        assert one["difference"] == pytest.approx((fast[layer] - slow[layer]).mean())
    assert found["paired"].values.tolist() == [False, True]
    ends = [[summary(each)["loss_end"] for each in trained(arms, *some)] for some in (FAST, SLOW)]
    assert float(found["p_loss_end"][1]) == pytest.approx(stats.ttest_rel(*ends).pvalue)
    assert ("begin from the same checkpoint" in found.attrs["notes"]) == (paired is None)


APART: dict[str, tuple[list[str], list[str], bool | None]] = {
    "by word": (SLOW, FAST, False),
    "a seed too few": (SLOW, FAST[:2], None),
    "no seed in common": (SLOW[:2], ["../other/deep-1", "../other/deep-2"], None),
}


@pytest.mark.parametrize("case", APART)
def test_runs_that_are_no_pairs_are_tested_apart(arms: Path, root: Path, case: str) -> None:
    first, second, paired = APART[case]
    one = trained(arms, *first)
    two = [
        open_run(root / f"{Path(name).name}.lca")["train"]
        if "other" in name
        else trained(arms, name)[0]
        for name in second
    ]
    found = compare({"one": one, "two": two}, paired=paired)
    a, b = (
        found["total"].sel(label=label, layer="0").dropna("run").values for label in ("one", "two")
    )
    assert float(found["p_difference"].sel(label="two", layer="0")) == pytest.approx(
        stats.ttest_ind(b, a, equal_var=False).pvalue
    )
    assert not found["paired"].any()


def test_trainings_in_both_labels_are_no_chance(arms: Path) -> None:
    """Two of three runs in common are neither pairs nor apart; all of them, measured in two ways,
    are pairs.
    """
    found = compare(
        {"one": trained(arms, *SLOW), "two": trained(arms, SLOW[0], SLOW[1], "fast/shallow-2")}
    )
    assert np.isnan(found["p_difference"].values).all()
    says(found.attrs["notes"], "share trainings", "not tested against each other")
    again_ = compare(
        {"one": trained(arms, SLOW[0], SLOW[1]), "two": trained(arms, "copy", SLOW[1])}
    )
    assert again_["paired"].values.tolist() == [False, True]
    assert np.isnan(again_["p_difference"].values).all()  # no spread: all differences are 0


def test_weights_that_do_not_move_at_first_do_not_make_two_trainings_one(tmp_path: Path) -> None:
    """A warm-up from nothing: checkpoints 0 and 1 are those of both trainings, and are no sign of
    one.
    """
    for rate in (0.1, 0.3):
        replay(tmp_path / str(rate), "deep", 1, 3, rate=rate, still=1)
    found = compare({str(rate): trained(tmp_path, f"{rate}/deep-1") for rate in (0.1, 0.3)})
    assert found.attrs["notes"] == ""


def test_pairs_need_as_many_runs(arms: Path) -> None:
    with pytest.raises(
        InputError, match="same number of runs under every label, got 3 under 'a', 2 under 'b'"
    ):
        compare({"a": trained(arms, *SLOW), "b": trained(arms, *FAST[:2])}, paired=True)


def test_the_command_says_pairs_and_what_differs(arms: Path) -> None:
    result = lca("compare", f"slow={arms}/slow/*.lca", f"fast={arms}/fast/*.lca")
    assert (result.exit_code, result.stderr) == (0, "")
    says(
        " ".join(result.stdout.split()),
        "its difference to slow: paired t-test;",
        "form pairs that begin from the same",
    )
    apart = lca("compare", f"slow={arms}/slow/*.lca", f"fast={arms}/fast/*.lca", "--unpaired")
    says(apart.stdout, "its difference to slow: Welch's;")
    result = lca("compare", f"a={arms}/slow/*.lca", f"a={arms}/copy.lca", f"b={arms}/batch.lca")
    says(
        " ".join(result.stdout.split()),
        "different trainings 3 1",
        "Runs differ in normalisation (--norm-stats)",
    )
    made = document(lca("compare", f"a={arms}/slow/*.lca", f"a={arms}/copy.lca", "--json"))
    assert (made["labels"]["a"]["runs"], made["labels"]["a"]["trainings"]) == (4, 3)
    says(made["notes"], "of one training")


@pytest.mark.parametrize(("place", "files"), [("c.nc", ["c.nc"]), ("c", ["c/compare.nc"])])
def test_a_comparison_is_written_like_other_findings(
    arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, files: list[str]
) -> None:
    from lca_posthoc.export import read_netcdf

    monkeypatch.chdir(tmp_path)
    wanted = compare({"slow": trained(arms, *SLOW), "fast": trained(arms, *FAST)})
    result = lca("compare", f"slow={arms}/slow/*.lca", f"fast={arms}/fast/*.lca", "-o", place)
    assert (result.exit_code, result.stdout) == (0, f"wrote 1 file to {place}\n"), result.output
    assert [str(path) for path in Path().rglob("*") if path.is_file()] == files
    back = read_netcdf(Path(files[0]))
    for name in wanted.data_vars:
        assert np.array_equal(
            np.asarray(back[name].values, "f8"),
            np.asarray(wanted[name].values, "f8"),
            equal_nan=True,
        )
    assert back.attrs["notes"] == wanted.attrs["notes"]


def test_a_comparison_as_tables(arms: Path, tmp_path: Path) -> None:
    result = lca(
        "compare",
        arms / f"{SLOW[0]}.lca",
        arms / "rule.lca",
        "-o",
        tmp_path / "t",
        "--format",
        "csv",
    )
    assert result.exit_code == 0, result.output
    says(result.stderr, "share trainings", "Runs differ in rule")
    files = {path.name for path in (tmp_path / "t").iterdir()}
    assert {
        "about.json",
        "compare_label_layer.csv",
        "compare_label.csv",
        "compare_label_layer_run.csv",
    } <= files
    refused(lca("compare", arms / "rule.lca", "-o", tmp_path / "t"), "already exists")
    refused(
        lca("compare", arms / "rule.lca", "-o", tmp_path / "x.csv"),
        "a comparison is one file as .nc alone",
    )
    refused(lca("compare", arms / "rule.lca", "-o", tmp_path / "x", "--json"), "take one of them")
    refused(lca("compare", arms / "rule.lca", "--format", "csv"), "-o")
