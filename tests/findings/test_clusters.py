"""Clusters against planted ones, a null that must hold its level, and an index counted pair by
pair.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from lca_posthoc import findings, plots
from lca_posthoc.errors import InputError
from lca_posthoc.findings import clusters as function
from lca_posthoc.findings import per_example
from lca_posthoc.findings.clusters import adjusted_rand, central_name, judged, one_cluster
from lca_posthoc.report import write_report

from ..helpers import example_runs
from ..helpers.cli import lca
from ..helpers.example_runs import OtherExamples, Told

mpl.use("agg")
Array = np.ndarray[Any, Any]
null, space = (function.__globals__[name] for name in ("_null", "_space"))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return example_runs.tell(tmp_path_factory.mktemp("told"))


def of(told: Told, examples: xr.Dataset, **options: Any) -> xr.Dataset:
    return findings.clusters(OtherExamples(told.run["train"], examples), **options)


def planted(told: Told, rows: int = 24) -> tuple[xr.Dataset, Array]:
    """Examples that tensors helped early, late, or not, in turn, with a little noise."""
    data = told.examples.copy(deep=True)
    kinds = np.arange(rows) % 3
    moves = 1e-3 * np.random.default_rng(0).standard_normal(data["allocated"].shape)
    moves[:4, kinds == 0] -= 0.1
    moves[-4:, kinds == 1] -= 0.1
    data["allocated"].values[:] = moves
    return data, kinds


# --- the index ------------------------------------------------------------------------------------


def pair_by_pair(one: list[int], other: list[int]) -> float:
    """Pairs that are together in both, above chance, over the most there could be."""
    pairs = list(itertools.combinations(range(len(one)), 2))
    in_one = [one[a] == one[b] for a, b in pairs]
    in_other = [other[a] == other[b] for a, b in pairs]
    both = sum(a and b for a, b in zip(in_one, in_other, strict=True))
    expected = sum(in_one) * sum(in_other) / len(pairs)
    most = (sum(in_one) + sum(in_other)) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_the_adjusted_rand_index_counts_pairs(labels: list[tuple[int, int]]) -> None:
    one, other = [first for first, _ in labels], [second for _, second in labels]
    index = adjusted_rand(np.array(one), np.array(other))
    assert index == pytest.approx(pair_by_pair(one, other))
    renamed = 3 - np.array(other)
    assert adjusted_rand(np.array(one), renamed) == pytest.approx(index)


# --- clusters -------------------------------------------------------------------------------------


def test_planted_clusters_come_back(told: Told) -> None:
    data, kinds = planted(told)
    found = of(told, data, clusters=3)
    assert adjusted_rand(found["cluster"].values, kinds) == 1
    assert found["stability"].values.tolist() == [1.0] * 10
    assert float(found["p"]) == 1 / 20
    shares = found["left_out_share"].values
    assert shares[0] == pytest.approx(1)
    assert shares[2] < 0.01 < 0.1 < shares[1]


def test_shares_and_means_are_those_of_the_labels(told: Told) -> None:
    found = of(told, told.examples, frames=5, by="tensor")
    moves = told.examples["allocated"].values.astype(float)
    ends = (found["stretch_end"].values // 5).tolist()
    points = np.stack([moves[:end].sum(0) for end in ends], axis=1)
    labels = found["cluster"].values
    within = 0.0
    for cluster in range(4):
        own = points[labels == cluster]
        mean = own.mean(0)
        np.testing.assert_allclose(found["trajectory"][cluster], mean, atol=1e-9)
        assert int(found["size"][cluster]) == len(own)
        within += ((own - mean) ** 2).sum()
        distance = ((own - mean) ** 2).reshape(len(own), -1).sum(1)
        nearest = np.flatnonzero(labels == cluster)[distance.argmin()]
        assert central_name(found, cluster) == str(nearest)
        losses = told.examples["loss_end"].values[[end - 1 for end in ends]].astype(float)
        np.testing.assert_allclose(found["loss"][cluster], losses[:, labels == cluster].mean(1))
    whole = ((points - points.mean(0)) ** 2).sum()
    assert float(found["left_out_share"].sel(k=4)) == pytest.approx(within / whole)
    assert sorted(found["size"].values.tolist(), reverse=True) == found["size"].values.tolist()
    assert f"leave out {100 * within / whole:.1f} % of the variance" in judged(found)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (12, 12)])
def test_directions_that_are_left_out_are_small(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(1).standard_normal(shape) * 0.5 ** np.arange(shape[1])
    result = space(points)
    centred = points - points.mean(0)
    assert result.variance == pytest.approx((centred**2).sum())
    assert (result.reduced**2).sum() >= 0.999 - 1e-9
    for a, b in itertools.combinations(range(shape[0]), 2):
        whole = ((points[a] - points[b]) ** 2).sum() / result.variance
        assert ((result.reduced[a] - result.reduced[b]) ** 2).sum() <= whole + 1e-9


# --- the null -------------------------------------------------------------------------------------


def p_value(moves: Array, draws: int = 19) -> float:
    shares = null(moves, 3, 2, draws)
    points = np.cumsum(moves, axis=1).reshape(len(moves), -1)
    kmeans = function.__globals__["_kmeans"]
    own = min(kmeans(space(points), 3, seed)[1] for seed in range(2))
    return (1 + int((shares <= own + 1e-9).sum())) / (1 + draws)


def test_the_null_holds_its_level_where_deviations_come_at_any_time() -> None:
    """With a common course, and stretches of different spread: p ≤ 0.1 in a tenth of cases."""
    course, spread = -np.exp(-np.arange(8) / 2)[:, None], np.linspace(1, 0.2, 8)[:, None]
    values = [
        p_value(course + spread * np.random.default_rng(seed).standard_normal((20, 8, 2)))
        for seed in range(120)
    ]
    # of 120 draws with probability 0.1 more than 24 are there once in 2,000
    assert 2 <= sum(value <= 0.1 for value in values) <= 24


def test_examples_that_differ_in_size_alone_are_not_told_apart_by_time() -> None:
    size = np.random.default_rng(0).lognormal(0, 1, 20)[:, None, None]
    course = -np.exp(-np.arange(8) / 2)[:, None] * np.array([1.0, 0.5])
    assert p_value(size * course) == 1


def test_examples_that_differ_in_time_are() -> None:
    moves = 0.05 * np.random.default_rng(0).standard_normal((30, 8, 2))
    moves[:10, :2] -= 1
    moves[10:20, 4:6] -= 1
    moves[20:, 6:] -= 1
    assert p_value(moves) == 1 / 20


# --- bounds, refusals, figures --------------------------------------------------------------------


def test_blocks_change_nothing_and_examples_are_drawn_from_every_part(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = told.examples["weight"].copy(deep=True)
    weight[:, 6] = 0
    data = told.examples.assign(weight=weight)
    whole = of(told, data, most=12, draws=3)
    shown = whole["example"].values
    edges = np.linspace(0, 23, 13).astype(int)
    ranks = np.searchsorted(np.delete(np.arange(24), 6), shown)
    assert (edges[:-1] <= ranks).all()
    assert (ranks < edges[1:]).all()
    assert 6 not in shown
    assert {*np.diff(ranks).tolist()} != {2}  # no stride, which could be that of a sequence
    assert "Clusters use 12 of 23 examples, drawn at random" in whole.attrs["left_out"]
    assert "Excluded: 1 example of weight 0." in whole.attrs["left_out"]
    monkeypatch.setattr(per_example, "BLOCK", 4)
    xr.testing.assert_allclose(of(told, data, most=12, draws=3), whole)


def test_examples_that_nothing_happened_to_are_one_cluster(told: Told) -> None:
    data = told.examples.copy(deep=True)
    data["allocated"].values[:] = 0
    found = of(told, data, draws=2)
    assert found["size"].values.tolist() == [24, 0, 0, 0]
    assert (float(found["p"]), float(found["stability_mean"])) == (1, 1)
    assert "All examples were learned alike" in found.attrs["left_out"]
    plots.clusters(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 25}, "24 examples for 25 clusters"),
        ({"clusters": 0}, "at least one cluster"),
        ({"seeds": 1}, "two seeds"),
        ({"draws": 0}, "one draw"),
        ({"most": 0}, "at least one example"),
        ({"frames": 0}, "at least one frame"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(
    told: Told, options: dict[str, int], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        of(told, told.examples, **options)


def test_a_run_that_does_not_tell_its_examples_is_refused(told: Told) -> None:
    with pytest.raises(InputError, match="has no numbers of single examples"):
        findings.clusters(told.run["plain"])


def test_elements_can_be_put_into_clusters(told: Told) -> None:
    found = of(told, example_runs.by_element(told.examples, 2), draws=2)
    assert found["cluster"].dims == ("element",)
    assert all(":" in central_name(found, cluster) for cluster in range(4))


def test_the_figure_the_command_and_the_page_show_clusters(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = told.examples.assign_coords(text=("example", ['<img src=x onerror="a()">'] * 24))
    found = of(told, data)
    figure = plots.clusters(found)
    for cluster in range(4):
        lines = [np.asarray(line.get_ydata(), float) for line in figure.axes[cluster].lines]
        change = np.append(0.0, one_cluster(found, cluster)["change"].values)
        assert any(len(line) == len(change) and np.allclose(line, change) for line in lines)
    example_runs.patched(monkeypatch, Told(told.run, told.checkpoints, data))
    result = lca("plot", told.run.path, "clusters", "--clusters", 3, "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    page = write_report([told.run], tmp_path / "page.html").read_text()
    # under losses that have none too
    assert '<section id="clusters" data-panels="0 1 2"' in page
    assert "<img src=x" not in page
    assert "of the variance" in page
