"""Each finding against a slow, separate computation on a run whose every allocation is known in
closed form.
"""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import xarray as xr

from lca_posthoc import Loss, Recorder, Run, Task, findings, open_run, run
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.numerics.schema import KEEP, holds

from ..helpers import quadratic_bowl
from ..helpers.quadratic_bowl import SEGMENTS, SHAPES, Bowl

PARAMETERS = [name for name in SHAPES if name != quadratic_bowl.BUFFER]
LAYERS = ["first", "norm", "body.conv"]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Bowl:
    return quadratic_bowl.replay(tmp_path_factory.mktemp("bowl"))


@pytest.fixture(scope="module", params=KEEP[:-1])
def less(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bowl:
    return quadratic_bowl.replay(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Bowl:
    """Without the spans in the middle."""
    directory = tmp_path_factory.mktemp("unfinished")
    done = quadratic_bowl.replay(directory)
    for loss in done.run:
        markers = sorted((done.run.path / "commits").rglob("*.json"))
        markers = [
            each for each in markers if each.parent.name == done.run.manifest.losses[loss].key
        ]
        markers[len(markers) // 2].unlink()
    return Bowl(done.checkpoints, open_run(done.run.path))


def each_parameter() -> list[tuple[str, tuple[int, ...], int]]:
    """Tensor, indices and flat position of every parameter that is no buffer."""
    return [
        (name, index, quadratic_bowl.offset(name) + at)
        for name in PARAMETERS
        for at, index in enumerate(np.ndindex(*SHAPES[name]))
    ]


def unit(name: str) -> list[int]:
    """Flat positions of the parameters of a unit, written as layer[index]."""
    layer, _, index = name.removesuffix("]").partition("[")
    tensors = [each for each in PARAMETERS if each.rpartition(".")[0] == layer]
    return [
        at for each, place, at in each_parameter() if each in tensors and place[0] == int(index)
    ]


def close(found: object, expected: object) -> None:
    np.testing.assert_allclose(
        np.asarray(found, float), np.asarray(expected, float), rtol=1e-6, atol=1e-9
    )


def turns(series: np.ndarray) -> int:
    signs = [math.copysign(1, value) for value in series if value != 0]
    return sum(a != b for a, b in itertools.pairwise(signs))


def test_the_bowl_is_what_it_says(replayed: Bowl) -> None:
    stored = replayed.run["train"].allocation
    for name in SHAPES:
        close(stored[name], quadratic_bowl.part(name, quadratic_bowl.whole()))


def test_every_result_says_what_it_is(replayed: Bowl) -> None:
    train = replayed.run["train"]
    for name in (
        "curve",
        "distribution",
        "helping",
        "oscillation",
        "layers",
        "units",
        "peaks",
        "candidates",
        "microscope",
    ):
        found = getattr(findings, name)(train)
        buffers = (
            "Buffers, such as running statistics, are excluded; their sum is -0.5156."
            if name == "candidates"
            else ""
        )
        assert (found.attrs["finding"], found.attrs["loss"], found.attrs["left_out"]) == (
            name,
            "train",
            buffers,
        )
        assert all(
            {"units", "long_name"} <= set(each.attrs) for each in found.data_vars.values()
        ), name


def test_curve(replayed: Bowl) -> None:
    found = findings.curve(replayed.run["groups"])
    losses = quadratic_bowl.losses()
    close(found["loss_start"], losses[:-1])
    close(found["loss"], losses[1:])
    added = losses[0].copy()
    for at, row in enumerate(quadratic_bowl.allocations().sum(-1)):
        added += row
        close(found["predicted"][at], added)
        close(found["residual_total"][at], losses[at + 1] - added)
    assert list(found["step"].values) == list(range(SEGMENTS))
    assert list(found["step_end"].values) == list(range(1, SEGMENTS + 1))


def test_curve_starts_again_after_a_gap(unfinished: Bowl) -> None:
    found = findings.curve(unfinished.run["train"])
    assert found.sizes["step"] < SEGMENTS
    assert "lca run" in found.attrs["left_out"]
    close(found["predicted"], found["loss"])


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (
            "module",
            {
                "first": ["first.weight", "first.bias"],
                "first buffer": ["first.shift"],
                "norm": ["norm.weight"],
                "body.conv": ["body.conv.weight", "body.conv.bias"],
            },
        ),
        ("tensor", {name: [name] for name in [*PARAMETERS, quadratic_bowl.BUFFER]}),
        (
            1,
            {
                "first": ["first.weight", "first.bias"],
                "first buffer": ["first.shift"],
                "norm": ["norm.weight"],
                "body": ["body.conv.weight", "body.conv.bias"],
            },
        ),
        (0, {"": PARAMETERS, "buffer": [quadratic_bowl.BUFFER]}),
    ],
)
@pytest.mark.parametrize("loss", ["train", "groups"])
def test_layers(replayed: Bowl, by: str | int, expected: dict[str, list[str]], loss: str) -> None:
    found = findings.layers(replayed.run[loss], by=by)
    allocations = quadratic_bowl.allocations() if loss == "groups" else quadratic_bowl.whole()
    assert list(found["layer"].values) == list(expected)
    for layer, names in expected.items():
        values = np.concatenate(
            [
                quadratic_bowl.part(name, allocations).reshape(*allocations.shape[:-1], -1)
                for name in names
            ],
            -1,
        )
        one = found.sel(layer=layer)
        close(one["allocated"], values.sum(-1))
        close(one["cumulative"], np.cumsum(values.sum(-1), axis=0))
        close(one["total"], values.sum((0, -1)))
        close(one["mean"], values.sum((0, -1)) / values.shape[-1])
        close(one["helping"], (values < 0).mean((0, -1)))
        assert int(one["elements"]) == values.shape[-1]


def test_layers_apart(replayed: Bowl) -> None:
    found = findings.layers(replayed.run["train"], by_role=True)
    assert dict(zip(found["layer"].values, found["role"].values, strict=True)) == {
        "first kernel": "kernel",
        "first bias": "bias",
        "first buffer": "buffer",
        "norm normalisation": "normalisation",
        "body.conv kernel": "kernel",
        "body.conv bias": "bias",
    }
    close(found["total"].sum(), quadratic_bowl.whole().sum())
    with pytest.raises(InputError, match="by is"):
        findings.layers(replayed.run["train"], by="colour")


def test_helping_by_segment(replayed: Bowl) -> None:
    for loss, allocations in (
        ("train", quadratic_bowl.whole()),
        ("groups", quadratic_bowl.allocations()),
    ):
        found = findings.helping(replayed.run[loss])
        values = np.concatenate(
            [
                quadratic_bowl.part(name, allocations).reshape(*allocations.shape[:-1], -1)
                for name in PARAMETERS
            ],
            -1,
        )
        close(found["helping"], (values < 0).mean(-1))
        close(found["hurting"], (values > 0).mean(-1))
        close(found["zero"], (values == 0).mean(-1))
        for name in PARAMETERS:
            axes = tuple(range(allocations.ndim - 1, allocations.ndim - 1 + len(SHAPES[name])))
            close(
                found["tensor_helping"].sel(tensor=name),
                (quadratic_bowl.part(name, allocations) < 0).mean(axes),
            )
            close(
                found["tensor_hurting"].sel(tensor=name),
                (quadratic_bowl.part(name, allocations) > 0).mean(axes),
            )


def test_helping_over_time(replayed: Bowl) -> None:
    most = 4
    found = findings.helping(replayed.run["train"], most=most)
    shares, records = [], {}
    for name, index, at in each_parameter():
        series = quadratic_bowl.whole()[:, at]
        helped, effects = int((series < 0).sum()), int((series != 0).sum())
        if effects:
            shares.append(helped / effects)
            records[f"{name}[{', '.join(map(str, index))}]"] = (helped, effects, series.sum())
    close(found["parameters"].sum(), len(shares))
    for low, high, count in zip(
        found["share_low"].values,
        found["share_high"].values,
        found["parameters"].values,
        strict=True,
    ):
        assert count == sum(
            low <= share + 1e-12 < high or (share == 1 and high == 1) for share in shares
        )
    probability = sum(helped for helped, _, _ in records.values()) / sum(
        effects for _, effects, _ in records.values()
    )
    close(found["probability"], probability)
    tails = {
        "hero": {
            name: scipy.stats.binomtest(h, n, probability, "greater").pvalue
            for name, (h, n, _) in records.items()
        },
        "villain": {
            name: scipy.stats.binomtest(h, n, probability, "less").pvalue
            for name, (h, n, _) in records.items()
        },
    }
    for dim, tail in tails.items():
        names = list(found[f"{dim}_name"].values)
        close([tail[name] for name in names], sorted(tail.values())[:most])
        close(found[f"{dim}_p"], [min(1, tail[name] * len(records)) for name in names])
        close(found[f"{dim}_share"], [records[name][0] / records[name][1] for name in names])
        close(found[f"{dim}_segments"], [records[name][1] for name in names])
        close(found[f"{dim}_allocated"], [records[name][2] for name in names])
    close(found["expected"].sum(), len(shares))
    drawn = np.random.default_rng(0).binomial(
        [n for _, n, _ in records.values()], probability, (4000, len(records))
    )
    effects = np.array([n for _, n, _ in records.values()])
    upper = found["share_high"].values <= 0.5
    close_enough = (drawn * 2 < effects).sum(1)
    assert (
        abs(float(found["expected"].values[upper].sum()) - close_enough.mean())
        < 5 * close_enough.std() / math.sqrt(4000) + 1e-9
    )


def test_distribution(replayed: Bowl) -> None:
    found = findings.distribution(replayed.run["train"], sample=3000)
    values = np.concatenate(
        [quadratic_bowl.part(name, quadratic_bowl.whole()).reshape(-1) for name in PARAMETERS]
    )
    nonzero = values[values != 0]
    for low, high, count in zip(
        found["lower"].values, found["upper"].values, found["count"].values, strict=True
    ):
        inside = (
            (low <= nonzero) & (nonzero < high) if low >= 0 else (low < nonzero) & (nonzero <= high)
        )
        assert count == inside.sum()
    assert int(found["count"].sum()) == len(nonzero)
    close(found["zero"], (values == 0).sum())
    close(found["helping"], (values < 0).mean())
    close(found["hurting"], (values > 0).mean())
    close(found["mean"], values.mean())
    size = np.sort(abs(values))
    top = size[-max(1, round(0.01 * len(size))) :].sum() / size.sum()
    assert found["top_share_low"] <= top <= found["top_share_high"]
    gini = sum(abs(a - b) for a in size for b in size) / (2 * len(size) ** 2 * size.mean())
    assert found["gini_low"] - 1e-9 <= gini <= found["gini_high"] + 1e-9
    assert found["gini_low"] <= found["gini"] <= found["gini_high"]
    assert set(np.unique(found["sample"])) <= set(values.astype("float32"))
    draws = np.asarray(found["sample"], float)
    assert (
        scipy.stats.binomtest(int((draws < 0).sum()), len(draws), float((values < 0).mean())).pvalue
        > 1e-4
    )
    again = findings.distribution(replayed.run["train"], sample=3000)
    assert np.array_equal(draws, again["sample"])
    assert not np.array_equal(
        draws, findings.distribution(replayed.run["train"], sample=3000, seed=1)["sample"]
    )


@pytest.mark.parametrize("shape", [0.5, 0.8])
def test_the_heavy_tail_is_found_again(shape: float) -> None:
    from lca_posthoc.findings.distribution import _fitted

    drawn = scipy.stats.dweibull.rvs(shape, scale=3e-9, size=20_000, random_state=3)
    found = _fitted(np.append(drawn, np.zeros(500)).astype("float32"))
    assert found["weibull_shape"][1] == pytest.approx(shape, rel=0.02)
    assert found["weibull_scale"][1] == pytest.approx(3e-9, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_inequality_hold_and_are_tight_in_narrow_bins(seed: int) -> None:
    """Of random values in random bins: the true figures lie inside, and inside hardly anything
    where bins are narrow.
    """
    from lca_posthoc.findings.distribution import _gini, _top

    generator = np.random.default_rng(seed)
    size = np.sort(generator.lognormal(0, 2, 400))
    zero = int(generator.integers(0, 100))
    everything = np.append(np.zeros(zero), size)
    gini = np.abs(everything[:, None] - everything).sum() / (
        2 * len(everything) ** 2 * everything.mean()
    )
    top = np.sort(everything)[-max(1, round(0.01 * len(everything))) :].sum() / everything.sum()
    for ratio, width in ((1.5, 0.4), (1.0001, 1e-3)):
        edges = (
            size[0]
            * 0.99
            * ratio ** np.arange(np.ceil(np.log(size[-1] / size[0] * 1.1) / np.log(ratio)) + 2)
        )
        count, _ = np.histogram(size, edges)
        low, high = edges[:-1], edges[1:]
        bounds = _gini(count, zero, high, low), _gini(count, zero, low, high)
        assert bounds[0] - 1e-9 <= gini <= bounds[1] + 1e-9
        assert bounds[1] - bounds[0] < width
        bounds = _top(count, low, high, len(everything)), _top(count, high, low, len(everything))
        assert bounds[0] <= top <= bounds[1]
        assert bounds[1] - bounds[0] < width


def test_oscillation(replayed: Bowl) -> None:
    found = findings.oscillation(replayed.run["train"], most=2)
    motion, allocation = np.diff(quadratic_bowl.path(), axis=0), quadratic_bowl.whole()
    pooled: list[list[int]] = []
    for name in PARAMETERS:
        rows = [
            [turns(series[:, at]) for series in (motion, quadratic_bowl.gradients(), allocation)]
            for each, _, at in each_parameter()
            if each == name and (allocation[:, at] != 0).any()
        ]
        pooled += rows
        close(found["turns"].sel(tensor=name), np.mean(rows, axis=0))
    close(found["overall_turns"], np.mean(pooled, axis=0))
    close(found["overall_interval"], SEGMENTS / np.mean(pooled, axis=0))


def test_traces_are_those_of_the_parameters_that_did_most(replayed: Bowl) -> None:
    found = findings.oscillation(replayed.run["train"], most=2)
    totals = {
        f"{name}[{', '.join(map(str, index))}]": (quadratic_bowl.whole()[:, at].sum(), at)
        for name, index, at in each_parameter()
    }
    ordered = sorted(totals, key=lambda name: totals[name][0])
    for why, expected in (("helped most", ordered[:2]), ("hurt most", ordered[:-3:-1])):
        names = list(found["parameter"].values[found["why"].values == why])
        close([totals[name][0] for name in names], [totals[name][0] for name in expected])
    for row, name in enumerate(found["parameter"].values):
        at = totals[name][1]
        close(found["allocation"][row], quadratic_bowl.whole()[:, at])
        close(found["weight"][row], quadratic_bowl.path()[:-1, at])
        moved = np.diff(quadratic_bowl.path()[:, at]) != 0
        close(found["gradient"][row][moved], quadratic_bowl.gradients()[moved, at])
        assert np.isnan(found["gradient"][row][~moved]).all()


def test_traces_of_named_parameters(replayed: Bowl, tmp_path: Path) -> None:
    names = ["body.conv.weight[1, 2, 0, 1]", "first.shift[2]"]
    found = findings.oscillation(replayed.run["groups"], parameters=names)
    at = quadratic_bowl.offset("body.conv.weight") + int(
        np.ravel_multi_index((1, 2, 0, 1), (2, 3, 2, 2))
    )
    close(
        found["allocation"].transpose("trace", "step", "group")[0],
        quadratic_bowl.allocations()[:, :, at],
    )
    close(found["weight"][1], quadratic_bowl.path()[:-1, quadratic_bowl.offset("first.shift") + 2])
    for wrong in ("nothing[1]", "first.weight[1]", "first.weight[3, 0]", "first.weight[0,"):
        with pytest.raises(InputError, match=r"NAME\[I, J\]"):
            findings.oscillation(replayed.run["train"], parameters=[wrong])
    with pytest.raises(LCAError, match="cannot read"):
        findings.oscillation(replayed.run["train"], checkpoints=tmp_path)


def test_units(replayed: Bowl) -> None:
    found = findings.units(replayed.run["groups"])
    assert list(zip(found["layer"].values, found["index"].values.tolist(), strict=True)) == [
        *(("first", index) for index in range(3)),
        *(("first buffer", index) for index in range(3)),
        *(("norm", index) for index in range(3)),
        *(("body.conv", index) for index in range(2)),
    ]
    for at, (layer, index) in enumerate(
        zip(found["layer"].values, found["index"].values, strict=True)
    ):
        summed = sum(
            quadratic_bowl.part(name, quadratic_bowl.allocations())[:, :, index]
            .reshape(SEGMENTS, 2, -1)
            .sum(-1)
            for name in SHAPES
            if name.rpartition(".")[0] + " buffer" * (name == quadratic_bowl.BUFFER) == layer
        )
        close(found["allocated"][..., at], summed)
        close(found["total"][at], summed.sum(0))
    one = findings.units(replayed.run["groups"], layer="norm")
    close(one["total"], found["total"][6:9])
    with pytest.raises(InputError, match="no layer 'nothing'"):
        findings.units(replayed.run["train"], layer="nothing")


@pytest.mark.parametrize("frames", [1, 5, 7, SEGMENTS, 100])
def test_stretches_add_up(replayed: Bowl, frames: int) -> None:
    every, found = (
        findings.units(replayed.run["train"]),
        findings.units(replayed.run["train"], frames=frames),
    )
    assert found.sizes["step"] <= frames
    for at, (start, end) in enumerate(
        zip(found["step"].values, found["step_end"].values, strict=True)
    ):
        inside = (every["step"].values >= start) & (every["step_end"].values <= end)
        close(found["allocated"][at], every["allocated"][inside].sum("step"))
    close(found["total"], every["total"])


def test_generalisation(replayed: Bowl) -> None:
    train, validation = replayed.run["train"], replayed.run["validation"]
    found = findings.generalisation(train, validation, most=3)
    one, two = quadratic_bowl.whole().sum(0), quadratic_bowl.allocations()[:, 1].sum(0)
    close(found["train"], findings.layers(train)["total"])
    close(found["cumulative_validation"], findings.layers(validation)["cumulative"])
    for tensor in PARAMETERS:
        expected: dict[str, list[int]] = {name: [] for name in found["quadrant"].values}
        for name, _, at in each_parameter():
            if name == tensor:
                words = {-1: "helped", 1: "hurt"}
                signs = int(np.sign(one[at])), int(np.sign(two[at]))
                where = "zero on either"
                if 0 not in signs:
                    first, second = (words[sign] for sign in signs)
                    where = (
                        f"both {first}"
                        if first == second
                        else f"{first} train, {second} validation"
                    )
                expected[where].append(at)
        for where, positions in expected.items():
            cell = found.sel(quadrant=where, tensor=tensor)
            assert int(cell["parameters"]) == len(positions)
            close(cell["allocated_train"], one[positions].sum())
            close(cell["allocated_validation"], two[positions].sum())
    harm = {
        f"{n}[{', '.join(map(str, i))}]": min(-one[at], two[at])
        for n, i, at in each_parameter()
        if one[at] < 0 < two[at]
    }
    assert (
        list(found["worst_name"].values)
        == sorted(harm, key=lambda name: -harm[name])[: min(3, len(harm))]
    )


def test_generalisation_refuses_what_is_not_one_path(replayed: Bowl, less: Bowl) -> None:
    with pytest.raises(InputError, match="two runs"):
        findings.generalisation(replayed.run["train"], less.run["validation"])
    with pytest.raises(InputError, match="has groups"):
        findings.generalisation(replayed.run["train"], replayed.run["groups"])


def test_candidates(replayed: Bowl) -> None:
    for loss in ("train", "groups"):
        found = findings.candidates(replayed.run[loss], most=5)
        whole = quadratic_bowl.whole()
        for layer in LAYERS:
            members = [name for name in PARAMETERS if name.rpartition(".")[0] == layer]
            total = sum(quadratic_bowl.part(name, whole).sum() for name in members)
            close(found["total"].sel(layer=layer), total)
            assert bool(found["freeze"].sel(layer=layer)) == (total > 0)
        assert sorted(found["layer"].values) == sorted(LAYERS)  # no buffer among them
        assert list(found["total"].values) == sorted(found["total"].values, reverse=True)
        idle = ((found["silent"] + found["never_helped"]) / found["tensor_elements"]).values
        assert list(idle) == sorted(idle, reverse=True)
        for tensor in PARAMETERS:
            series = [whole[:, at] for name, _, at in each_parameter() if name == tensor]
            assert int(found["silent"].sel(tensor=tensor)) == sum(not each.any() for each in series)
            assert int(found["never_helped"].sel(tensor=tensor)) == sum(
                (each >= 0).all() and bool(each.any()) for each in series
            )
        hurting = sorted((whole[:, at].sum() for _, _, at in each_parameter()), reverse=True)[:5]
        close(found["parameter_allocated"], [value for value in hurting if value > 0])
        units = {
            f"{layer}[{index}]": sum(
                quadratic_bowl.part(name, whole)[:, index].sum()
                for name in PARAMETERS
                if name.rpartition(".")[0] == layer
            )
            for layer, count in (("first", 3), ("norm", 3), ("body.conv", 2))
            for index in range(count)
        }
        expected = sorted(
            (name for name in units if units[name] > 0), key=lambda name: -units[name]
        )[:5]
        assert list(found["unit_name"].values) == expected
        close(found["unit_total"], [units[name] for name in expected])
        dead = [name for name in units if not any(whole[:, at].any() for at in unit(name))]
        assert list(found["dead_name"].values) == dead
        assert "body.conv[0]" in dead
        assert found["dead_units"].sel(tensor="body.conv.weight") == 1


def test_a_dead_unit_is_named_also_where_it_is_the_only_one_of_its_layer(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.idle, self.scale = (
                torch.nn.Linear(2, 2),
                torch.nn.Linear(2, 1),
                torch.nn.Parameter(torch.ones(())),
            )

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.body(inputs).sum(1) + 0 * self.idle(inputs)[:, 0] + 0 * self.scale

    torch.manual_seed(0)
    model = Two()
    with Recorder(tmp_path / "ck", model) as recorder:
        for step in range(3):
            recorder.save(step)
            with torch.no_grad():
                model.body.weight += 0.1
                model.body.bias += 0.1
    data = torch.ones(4, 2), torch.zeros(4)
    replayed = run(
        tmp_path / "ck",
        Task(Two, {"train": data}, {"train": Loss(F.mse_loss)}),
        cluster="inline",
        out=tmp_path / "run",
    )
    assert list(findings.candidates(replayed["train"])["dead_name"].values) == ["idle[0]"]


def test_microscope(replayed: Bowl) -> None:
    found = findings.microscope(replayed.run["train"], frames=100)
    close(found["first.weight"], quadratic_bowl.part("first.weight", quadratic_bowl.whole()))
    close(found["first.bias"][..., 0], quadratic_bowl.part("first.bias", quadratic_bowl.whole()))
    kernel = quadratic_bowl.part("body.conv.weight", quadratic_bowl.whole())
    for out, into, row, column in np.ndindex(2, 3, 2, 2):
        close(
            found["body.conv.weight"][:, out * 2 + row, into * 2 + column],
            kernel[:, out, into, row, column],
        )
    assert found["body.conv.weight"].attrs["axes"] == [[0, 2], [1, 3]]
    assert found["body.conv.weight"].attrs["pool"] == [1, 1]
    assert quadratic_bowl.BUFFER not in found
    losses = np.average(quadratic_bowl.losses(), axis=1, weights=quadratic_bowl.COUNTS)
    close(found["step:loss_start"], losses[:-1])
    close(found["step:loss_end"], losses[1:])
    values = np.abs(np.concatenate([found[name].values.ravel() for name in PARAMETERS]))
    assert found.attrs["scale"] == pytest.approx(np.quantile(values[values > 0], 0.995))


@pytest.mark.parametrize(("frames", "pixels"), [(5, 1000), (7, 12), (1, 5)])
def test_the_microscope_adds_up_however_coarse(replayed: Bowl, frames: int, pixels: int) -> None:
    found = findings.microscope(replayed.run["train"], frames=frames, pixels=pixels)
    assert sum(found[name][0].size for name in PARAMETERS) <= pixels
    for name in PARAMETERS:
        tensor = quadratic_bowl.part(name, quadratic_bowl.whole())
        close(found[name].sum(), tensor.sum())
        flat = (
            tensor.transpose(0, 1, 3, 2, 4).reshape(SEGMENTS, 4, 6)
            if tensor.ndim == 5
            else tensor.reshape(SEGMENTS, tensor.shape[1], -1)
        )
        rows, columns = found[name].attrs["pool"]
        for at, (start, end) in enumerate(
            zip(found["step"].values, found["step_end"].values, strict=True)
        ):
            inside = flat[start:end].sum(0)
            for row, column in np.ndindex(found[name].shape[1:]):
                block = inside[
                    row * rows : (row + 1) * rows, column * columns : (column + 1) * columns
                ]
                close(found[name][at, row, column], block.sum())


def test_the_microscope_of_groups(replayed: Bowl) -> None:
    groups = replayed.run["groups"]
    close(
        findings.microscope(groups)["first.weight"],
        quadratic_bowl.part("first.weight", quadratic_bowl.whole()),
    )
    close(
        findings.microscope(groups, group=1)["first.weight"],
        quadratic_bowl.part("first.weight", quadratic_bowl.allocations()[:, 1]),
    )
    for name, group, message in (("groups", 7, "no group 7"), ("train", 1, "has no groups")):
        with pytest.raises(InputError, match=message):
            findings.microscope(replayed.run[name], group=group)
    with pytest.raises(InputError, match="no tensor"):
        findings.microscope(groups, tensors=["nothing"])
    with pytest.raises(InputError, match="do not fit"):
        findings.microscope(groups, pixels=3)
    with pytest.raises(InputError, match="at least one frame"):
        findings.microscope(groups, frames=0)


# below a level of `--keep`, variables that a finding goes without, and whether it says so
WITHOUT = {
    "layers": ("statistics", {"helping"}, False),
    "candidates": (
        "statistics",
        {"helping", "never_helped", "silent", "units", "dead_units", "unit_total"}
        | {"parameter_allocated", "parameter_helping"},
        True,
    ),
    "generalisation": (
        "statistics",
        {"parameters", "worst_train", "worst_validation"}
        | {"allocated_train", "allocated_validation"},
        True,
    ),
    "distribution": (
        "parameters",
        {"sample", "weibull_shape", "weibull_scale", "kurtosis"},
        True,
    ),
    "oscillation": ("parameters", {"allocation", "weight", "gradient"}, True),
}
LEVELS = {"units": "units", "microscope": "parameters"} | dict.fromkeys(
    ("helping", "distribution", "oscillation"), "statistics"
)


def found_of(run: Run, name: str, loss: str) -> xr.Dataset:
    """The finding of a loss; one of two losses takes the validation loss too."""
    two = declared_findings()[name].losses == 2
    found: xr.Dataset = getattr(findings, name)(run[loss], *([run["validation"]] if two else []))
    return found


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name, finding in declared_findings().items()
        if finding.runs != "compared" and not finding.examples and not finding.part
        for loss in ("train", "groups")[: 3 - finding.losses]  # of two losses neither has groups
    ],
)
def test_a_lower_level_gives_the_same_or_says_which_it_takes(
    replayed: Bowl, less: Bowl, name: str, loss: str
) -> None:
    """And what it leaves out of a result is not there at all, neither as NaN nor as 0."""
    keep, level = less.run.manifest.keep, LEVELS.get(name, "tensors")
    if not holds(keep, level):
        with pytest.raises(LCAError, match=f"need --keep {level}") as refusal:
            found_of(less.run, name, loss)
        assert f"was made with --keep {keep}" in str(refusal.value)
        assert f"--keep {level} --out" in str(refusal.value)
        return
    full, found = found_of(replayed.run, name, loss), found_of(less.run, name, loss)
    needed, without, is_said = WITHOUT.get(name, ("tensors", set(), False))
    lacks = not holds(keep, needed)
    assert set(full.data_vars) - set(found.data_vars) == (without if lacks else set())
    assert set(found.data_vars) <= set(full.data_vars)
    for variable in found.data_vars:
        xr.testing.assert_allclose(
            full[variable], found[variable], rtol=1e-5, atol=1e-8, check_dim_order=True
        )
    assert (f"need --keep {needed}; this run keeps {keep}." in found.attrs["left_out"]) == (
        lacks and is_said
    )


def test_the_control_of_peaks_that_a_level_lacks_is_refused(less: Bowl) -> None:
    for signal in ("allocation", "motion"):
        findings.peaks(less.run["train"], signal=signal, draws=5)
    if less.run["train"].holds("statistics"):
        findings.peaks(less.run["train"], signal="gradient", draws=5)
    else:
        with pytest.raises(LCAError, match="peaks of the gradient need --keep statistics"):
            findings.peaks(less.run["train"], signal="gradient", draws=5)


def test_what_needs_every_segment_says_so(unfinished: Bowl) -> None:
    train = unfinished.run["train"]
    found = {
        name: getattr(findings, name)(train)
        for name in ("helping", "oscillation", "candidates", "layers", "units", "microscope")
    }
    found["generalisation"] = findings.generalisation(train, unfinished.run["validation"])
    for name, missing in (
        ("helping", "hero_p"),
        ("oscillation", "turns"),
        ("candidates", "silent"),
        ("generalisation", "parameters"),
    ):
        assert missing not in found[name]
        assert "every segment" in found[name].attrs["left_out"]
    rows = found["layers"]["step"].values
    close(found["layers"]["total"].sum(), quadratic_bowl.whole()[rows].sum())
    close(
        found["microscope"]["first.weight"],
        quadratic_bowl.part("first.weight", quadratic_bowl.whole())[rows],
    )
    close(found["units"]["total"].sum(), quadratic_bowl.whole()[rows].sum())


def test_a_run_without_a_finished_segment_is_refused(tmp_path: Path) -> None:
    done = quadratic_bowl.replay(tmp_path)
    for marker in (done.run.path / "commits").rglob("*.json"):
        marker.unlink()
    train = open_run(done.run.path)["train"]
    for name in (
        "curve",
        "distribution",
        "helping",
        "oscillation",
        "layers",
        "units",
        "candidates",
        "microscope",
    ):
        with pytest.raises(LCAError, match="no finished segment"):
            getattr(findings, name)(train)


def test_kept_tensors_leave_a_remainder(tmp_path: Path) -> None:
    checkpoints = quadratic_bowl.record(tmp_path / "ck")
    opened = run(
        checkpoints,
        quadratic_bowl.task(),
        losses=["train"],
        cluster="inline",
        tensors=["first.*"],
        out=tmp_path / "r.lca",
    )
    found = findings.curve(opened["train"])
    close(found["predicted"], found["loss"])
    assert "remainder" in findings.layers(opened["train"]).attrs["left_out"]


def test_checkpoints_are_found_beside_a_run_that_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the reader stands; and where they are gone, the way out is said and nothing else is
    lost.
    """
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    quadratic_bowl.replay(Path("made"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "weight" in findings.oscillation(open_run("../made/parameters.lca")["train"])
    shutil.move(tmp_path / "made", tmp_path / "moved")
    assert "weight" in findings.oscillation(
        open_run(tmp_path / "moved" / "parameters.lca")["train"]
    )
    shutil.move(tmp_path / "moved" / "ck", tmp_path / "away")
    train = open_run(tmp_path / "moved" / "parameters.lca")["train"]
    without = findings.oscillation(train)
    assert "weight" not in without
    assert "checkpoints=" in without.attrs["left_out"]
    assert "weight" in findings.oscillation(train, checkpoints=tmp_path / "away")


def test_a_run_is_no_loss(replayed: Bowl) -> None:
    for name in (
        "curve",
        "layers",
        "helping",
        "distribution",
        "oscillation",
        "units",
        "candidates",
        "microscope",
    ):
        with pytest.raises(InputError, match='open_run\\(RUN\\)\\["train"\\]'):
            getattr(findings, name)(replayed.run)
