"""Findings made by hand, as small as they can be and still be drawn; each follows what
`lca_posthoc.findings` gives.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lca_posthoc import Run, findings
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.errors import LCAWarning
from lca_posthoc.findings.errors import verdicts
from lca_posthoc.findings.examples import FATES
from lca_posthoc.numerics.schema import CAUSES

STEPS = 12
LAYERS = ("fc1", "_fc$2", "fc3")
TENSORS = tuple(f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias"))
GROUPS = (0, 1, 2)


def noise(*shape: int) -> Any:
    return np.random.default_rng(shape).normal(size=shape)


def made(finding: str, variables: dict[str, Any], gap: bool = False, **coords: Any) -> xr.Dataset:
    if any("step" in dims for dims, *_ in variables.values()):
        start = np.arange(STEPS) * 5 + (np.arange(STEPS) >= 6) * 20 * gap
        coords |= {"step": start, "step_end": ("step", start + 5)}
    about = {"finding": finding, "run": "a.lca", "loss": "tr$ain", "split": "train", "left_out": ""}
    return xr.Dataset(variables, coords=coords, attrs=about)


def errors(dims: tuple[str, ...], total: Any, before: str = "") -> dict[str, Any]:
    """Return an error of each sum and its verdict; that of the last layer is larger than the sum."""
    size = 0.2 * abs(np.asarray(total, float))
    size[-1] *= 10
    words = verdicts(np.asarray(total, float), size, all_known=True)
    return {f"{before}error": (dims, size), f"{before}verdict": (dims, words)}


def curve(groups: bool = False, gap: bool = False) -> xr.Dataset:
    shape, dims = ((STEPS, 3), ("step", "group")) if groups else ((STEPS,), ("step",))
    loss = 2 * np.exp(-np.arange(STEPS) / 4)[(..., *(None,) * (len(shape) - 1))] + 0.05 * noise(
        *shape
    )
    residual = 1e-4 * noise(*shape)
    variables: dict[str, Any] = {
        "loss": (dims, loss),
        "loss_start": (dims, np.concatenate([loss[:1] + 0.3, loss[:-1]])),
        "predicted": (dims, loss + residual),
        "residual": (dims, residual),
        "residual_total": (dims, np.cumsum(residual, axis=0)),
        "converged": ("step", np.arange(STEPS) != 4),
        "level": ("step", np.ones(STEPS, int)),
        "evaluations": ("step", np.full(STEPS, 2)),
    }
    return made("curve", variables, gap, **({"group": list(GROUPS)} if groups else {}))


def distribution(groups: bool = False, fitted: bool = True) -> xr.Dataset:
    ends = 10.0 ** np.arange(-9, -2)
    lower, upper = np.append(-ends[:0:-1], ends[:-1]), np.append(-ends[-2::-1], ends[1:])
    count = np.array([5, 300, 900, 700, 60, 3, 3, 50, 600, 800, 350, 4])
    shape, dim = ((3,), ("group",)) if groups else ((), ())
    figures = {
        "helping": 0.51,
        "hurting": 0.46,
        "mean": -1e-9,
        "mean_absolute": 1e-6,
        "standard_deviation": 2e-5,
    }
    figures |= {
        "top_share": 0.4,
        "top_share_low": 0.35,
        "top_share_high": 0.47,
        "gini": 0.8,
        "gini_low": 0.77,
        "gini_high": 0.83,
    }
    variables: dict[str, Any] = {
        name: (dim, np.full(shape, value)) for name, value in figures.items()
    }
    variables["zero"] = (dim, np.full(shape, 120))
    variables["count"] = (
        ("bin", *dim),
        np.broadcast_to(count[(..., *(None,) * len(shape))], (12, *shape)),
    )
    if fitted:
        variables |= {
            "sample": ("draw", 1e-6 * noise(50)),
            "weibull_shape": ((), 0.53),
            "weibull_scale": ((), 1e-6),
        }
        variables["kurtosis"] = ((), 40.0)
    coords = {"group": list(GROUPS)} if groups else {}
    return made("distribution", variables, lower=("bin", lower), upper=("bin", upper), **coords)


def helping(groups: bool = False, whole: bool = True) -> xr.Dataset:
    shape, dims = ((STEPS, 3), ("step", "group")) if groups else ((STEPS,), ("step",))
    share = 0.5 + 0.05 * noise(*shape)
    each = 0.5 + 0.1 * noise(*shape, len(TENSORS))
    variables: dict[str, Any] = {
        "helping": (dims, share),
        "hurting": (dims, 0.97 - share),
        "zero": (dims, np.full(shape, 0.03)),
        "tensor_helping": ((*dims, "tensor"), each),
        "tensor_hurting": ((*dims, "tensor"), 1 - each),
        "tensor_moved": (("step", "tensor"), np.ones((STEPS, len(TENSORS)), "int8")),
    }
    coords: dict[str, Any] = {"tensor": list(TENSORS)} | ({"group": list(GROUPS)} if groups else {})
    if whole:
        edges = np.linspace(0, 1, 11)
        variables |= {
            "parameters": ("share", [0, 0, 2, 10, 60, 70, 12, 3, 0, 0]),
            "probability": ((), 0.51),
        }
        variables["expected"] = ("share", [0.0, 0, 1, 9, 64, 68, 10, 1, 0, 0])
        coords |= {
            "share": (edges[1:] + edges[:-1]) / 2,
            "share_low": ("share", edges[:-1]),
            "share_high": ("share", edges[1:]),
        }
        for side, away in (("hero", 0.2), ("villain", -0.2)):
            coords[f"{side}_name"] = (side, [f"{TENSORS[0]}[{at}, 1]" for at in range(3)])
            variables[f"{side}_share"] = (side, 0.5 + away + 0.01 * noise(3))
            variables[f"{side}_segments"] = (side, [8, 8, 8])
            variables[f"{side}_allocated"] = (side, -away * np.ones(3))
            variables[f"{side}_p"] = (side, [1e-9, 0.01, 1.0])
    return made("helping", variables, **coords)


def oscillation(groups: bool = False, traces: int = 3, only: bool = False) -> xr.Dataset:
    signals = ["weight", "gradient", "allocation"]
    interval = 5 + abs(noise(len(TENSORS), 3))
    variables: dict[str, Any] = {
        "turns": (("tensor", "signal"), STEPS / interval),
        "interval": (("tensor", "signal"), interval),
        "overall_turns": ("signal", [1.0, 2, 3]),
        "overall_interval": ("signal", [7.0, 10, 6]),
    }
    coords: dict[str, Any] = {
        "signal": signals,
        "tensor": list(TENSORS),
        "elements": ("tensor", [9] * len(TENSORS)),
    }
    if traces:
        more = (3,) if groups else ()
        dims = ("trace", "step", *(("group",) if groups else ()))
        variables["allocation"] = (dims, 1e-5 * noise(traces, STEPS, *more))
        if not only:
            variables["weight"] = (("trace", "step"), noise(traces, STEPS))
            variables["gradient"] = (dims, 1e-2 * noise(traces, STEPS, *more))
        why = ["helped most", "hurt most", "named"]
        coords |= {
            "parameter": ("trace", [f"_fc$2.weight[{at}, 0]" for at in range(traces)]),
            "why": ("trace", [why[at % 3] for at in range(traces)]),
        }
        coords |= {"group": list(GROUPS)} if groups else {}
    return made("oscillation", variables, **coords)


def layers(groups: bool = False, names: tuple[str, ...] = LAYERS, gap: bool = False) -> xr.Dataset:
    count = len(names)
    dims, shape = (
        (("step", "group", "layer"), (STEPS, 3, count))
        if groups
        else (("step", "layer"), (STEPS, count))
    )
    allocated = 0.01 * noise(*shape) - 0.02
    elements = np.arange(1, count + 1) * 10
    last = ("layer", "group") if groups else ("layer",)
    total = allocated.sum(0).T
    variables: dict[str, Any] = {
        "allocated": (dims, allocated),
        "cumulative": (dims, np.cumsum(allocated, axis=0)),
        "total": (last, total),
        **errors(last, total),
        "mean": (last, (total.T / elements).T),
        "helping": (last, np.full(total.shape, 0.5)),
    }
    coords: dict[str, Any] = {
        "layer": list(names),
        "elements": ("layer", elements),
        "role": ("layer", ["all"] * count),
    }
    return made("layers", variables, gap, **(coords | ({"group": list(GROUPS)} if groups else {})))


def units(groups: bool = False, gap: bool = False) -> xr.Dataset:
    counts = {"fc1": 4, "_fc$2": 3}
    dims, shape = (
        (("step", "group", "unit"), (STEPS, 3, 7)) if groups else (("step", "unit"), (STEPS, 7))
    )
    allocated = noise(*shape)
    layer = [name for name, count in counts.items() for _ in range(count)]
    index = [at for count in counts.values() for at in range(count)]
    variables = {
        "allocated": (dims, allocated),
        "total": (("unit", "group") if groups else ("unit",), allocated.sum(0).T),
    }
    coords: dict[str, Any] = {"layer": ("unit", layer), "index": ("unit", index)}
    return made("units", variables, gap, **(coords | ({"group": list(GROUPS)} if groups else {})))


def peaks(groups: tuple[Any, ...] = GROUPS, layers: tuple[str, ...] = LAYERS) -> xr.Dataset:
    peak = noise(STEPS, len(groups), len(layers)) > 0.2
    aligned = peak.all(-1)
    variables = {
        "peak": (("step", "group", "layer"), peak),
        "aligned": (("step", "group"), aligned),
        "observed": ("group", aligned.sum(0)),
        "observed_total": ((), aligned.sum()),
        "expected_total": ((), 1.5),
        "shift": ("draw", np.random.default_rng(0).poisson(1.5, 200)),
        "local": ("draw", np.random.default_rng(1).poisson(1.2, 200)),
        "p_local": ((), 0.03),
        "p_shift": ((), 0.04),
        "p_independent": ((), 0.02),
        "p_shift_group": ("group", [0.1] * len(groups)),
    }
    found = made("peaks", variables, group=list(groups), layer=list(layers))
    return found.assign_attrs(signal="allocation")


QUADRANTS = (
    "both helped",
    "helped train, hurt validation",
    "hurt train, helped validation",
    "both hurt",
    "zero on either",
)


def generalisation() -> xr.Dataset:
    variables = {
        "train": ("layer", [-1.0, -0.3, 0.1]),
        "validation": ("layer", [-0.9, -0.1, 0.2]),
        "cumulative_train": (("step", "layer"), noise(STEPS, 3)),
        "cumulative_validation": (("step", "layer"), noise(STEPS, 3)),
        "parameters": (("quadrant", "tensor"), np.arange(5 * len(TENSORS)).reshape(5, -1)),
        "allocated_train": (("quadrant", "tensor"), noise(5, len(TENSORS))),
        "allocated_validation": (("quadrant", "tensor"), noise(5, len(TENSORS))),
        "worst_train": ("worst", [-0.1, -0.2]),
        "worst_validation": ("worst", [0.3, 0.2]),
    }
    names = ["fc1.weight[0, 1]", "fc3.weight[1, 1]"]
    return made(
        "generalisation",
        variables,
        layer=list(LAYERS),
        quadrant=list(QUADRANTS),
        tensor=list(TENSORS),
        worst_name=("worst", names),
    ).assign_attrs(first="train", second="validation", loss="train, validation")


def candidates(units: bool = True) -> xr.Dataset:
    total = np.array([-1.0, -0.3, 0.1])
    variables: dict[str, Any] = {
        "total": ("layer", total),
        **errors(("layer",), total),
        "helping": ("layer", [0.5, 0.5, 0.5]),
        "mean": ("layer", total / 50),
        "freeze": ("layer", total > 0),
        "never_helped": ("tensor", [1, 0, 2, 0, 0, 1]),
        "silent": ("tensor", [4, 0, 0, 0, 0, 0]),
        "dead_units": ("tensor", [1, 1, 0, 0, 0, 0]),
        "units": ("tensor", [5] * 6),
        "parameter_allocated": ("parameter", [0.3, 0.2]),
        "parameter_helping": ("parameter", [0.4, 0.3]),
    }
    coords: dict[str, Any] = {
        "layer": list(LAYERS),
        "tensor": list(TENSORS),
        "elements": ("layer", [24] * 3),
    }
    coords["parameter_name"] = ("parameter", ["_fc$2.weight[1, 1]", "fc1.bias[0]"])
    if units:
        variables["unit_total"] = ("unit", [0.2, 0.1])
        coords |= {"unit_name": ("unit", ["fc1[3]", "fc3[0]"]), "dead_name": ("dead", ["fc1[1]"])}
    return made("candidates", variables, **coords)


def blocks(groups: bool = False) -> xr.Dataset:
    group, extent = (("group",), (3,)) if groups else ((), ())
    total = noise(4, 3, *extent)
    total[3, 2] = np.nan
    variables: dict[str, Any] = {
        "total": (("component", "depth", *group), total),
        "mean": (("component", "depth", *group), total / 10),
        "outside": (("outside_layer", *group), noise(3, *extent)),
        "head_total": (("projection", "depth", "head", *group), noise(2, 3, 2, *extent)),
    }
    names = ["attn._q$", "mlp", "norm", "extra"]
    coords: dict[str, Any] = {
        "component": [f"h.*.{name}" for name in names],
        "stack": ("component", ["h"] * 4),
        "name": ("component", names),
        "depth": [0, 1, 2],
        "parameters": (("component", "depth"), np.full((4, 3), 10)),
        "outside_layer": list(LAYERS),
        "projection": ["h.*.attn.query", "h.*.attn._key$"],
        "projection_stack": ("projection", ["h", "h"]),
        "role": ("projection", ["query", "key"]),
        "head": [0, 1],
    }
    return made("blocks", variables, **(coords | ({"group": list(GROUPS)} if groups else {})))


def causes(groups: bool = False, gap: bool = False) -> xr.Dataset:
    group, extent = (("group",), (3,)) if groups else ((), ())
    allocated = noise(STEPS, *extent, 3, len(CAUSES))
    allocated[..., -1] *= 0.3
    total = np.moveaxis(allocated.sum(0), 0, -1) if groups else allocated.sum(0)
    layer_total = total.sum(1)
    variables: dict[str, Any] = {
        "allocated": (("step", *group, "layer", "cause"), allocated),
        "cumulative": (("step", *group, "layer", "cause"), np.cumsum(allocated, axis=0)),
        "total": (("layer", "cause", *group), total),
        "layer_total": (("layer", *group), layer_total),
        **errors(("layer", "cause", *group), total),
        **errors(("layer", *group), layer_total, before="layer_"),
        "hurts": (("layer", *group), np.where(layer_total > 0, "noise", "").astype(object)),
        "rest_share": (("layer", *group), abs(noise(3, *extent))),
        "rest_overall": (group, np.full(extent, 0.12)),
        "rest_size": (("step", *group), np.full((STEPS, *extent), 0.06)),
        "size": (("step", *group), np.full((STEPS, *extent), 0.5)),
    }
    coords: dict[str, Any] = {
        "layer": list(LAYERS),
        "cause": list(CAUSES),
        "elements": ("layer", [24, 24, 24]),
        "kind": ("layer", ["parameter"] * 3),
    }
    found = made("causes", variables, gap, **(coords | ({"group": list(GROUPS)} if groups else {})))
    return found.assign_attrs(signal="tr$ain")


def directions(groups: bool = False, gap: bool = False, null: bool = True) -> xr.Dataset:
    group, extent = (("group",), (3,)) if groups else ((), ())
    allocated, outside = noise(STEPS, *extent, 4), noise(STEPS, *extent) / 3
    shares = np.random.default_rng(3).random(STEPS)
    series = {"inside": allocated.sum(-1), "outside": outside}
    if null:
        series["null_inside"] = 0.1 * series["inside"]
    variables: dict[str, Any] = {
        "allocated": (("step", *group, "direction"), allocated),
        "cumulative": (("step", *group, "direction"), np.cumsum(allocated, axis=0)),
        "total": (("direction", *group), allocated.sum(0).T),
        "captured": ("step", shares),
        "captured_total": ((), 0.6),
        "captured_direction": ("direction", [0.3, 0.1, 0.1, 0.1]),
        "captured_by_chance": ((), 0.02),
    }
    for name, values in series.items():
        variables |= {
            name: (("step", *group), values),
            f"{name}_cumulative": (("step", *group), np.cumsum(values, axis=0)),
            f"{name}_total": (group, values.sum(0)),
        }
    if null:
        variables |= {"null_captured": ("step", shares / 30), "null_captured_total": ((), 0.02)}
    coords: dict[str, Any] = {"direction": ["_fc$2", "first", "2", "3"]}
    return made(
        "directions", variables, gap, **(coords | ({"group": list(GROUPS)} if groups else {}))
    )


def examples() -> xr.Dataset:
    count, stretch = 9, np.arange(4) * 15
    layer, both = ("layer",), ("step", "layer")
    story = 0.3 * noise(2, 4, 3)
    variables: dict[str, Any] = {
        "interference": (both, np.random.default_rng(0).random((STEPS, 3))),
        "absolute": (both, abs(noise(STEPS, 3)) + 0.1),
        "interference_mean": (layer, [0.4, 0.6, 0.7]),
        "interference_total": (layer, [0.2, 0.1, 0.9]),
        "total": (layer, [-1.0, -0.3, 0.1]),
        **errors(layer, [-1.0, -0.3, 0.1]),
        "helped_most": (layer, [5, 3, 0]),
        "hurt_most": (layer, [0, 1, 2]),
        "forgot_most": (layer, [0, 0, 1]),
        "fates": ("fate_name", [1, 5, 2, 1]),
        "loss_start": ("example", np.full(count, 2.3)),
        "loss_end": ("example", np.linspace(0.1, 2.4, count)),
        "loss_lowest": ("example", np.full(count, 0.1)),
        "forgotten": ("example", np.linspace(0.0, 2.3, count)),
        "residual": ("example", 1e-4 * noise(count)),
        "step_half": ("example", np.full(count, 10)),
        "step_lowest": ("example", np.full(count, 20)),
        "events": ("example", np.arange(count) % 3),
        "fate": ("example", np.arange(count) % 4),
        "weight": ("example", np.append(np.ones(count - 1), 0.0)),
        "allocated": (("example", "layer"), noise(count, 3)),
        "since_lowest": (("example", "layer"), abs(noise(count, 3))),
        "story_loss": (("story", "stretch"), 2.3 + story.sum(-1)),
        "story_start": ("story", [2.3, 2.3]),
        "story_allocated": (("story", "stretch", "layer"), story),
        "story_change": ("story", story.sum(-1)[:, -1]),
        "story_forgotten": ("story", [0.0, 1.1]),
    }
    coords: dict[str, Any] = {
        "layer": list(LAYERS),
        "fate_name": list(FATES),
        "example": np.arange(count),
        "example_group": ("example", np.arange(count) % 3),
        "stretch_start": ("stretch", stretch),
        "stretch_end": ("stretch", stretch + 15),
        "story_kind": ("story", ["most helped", "most forgotten"]),
        "story_fate": ("story", ["learned and kept", "forgotten"]),
        "story_layer": ("story", ["fc1", "_fc$2"]),
        "story_example": ("story", [0, 7]),
        "story_text": ("story", ["a $zero$", "_a seven"]),
    }
    about = {"per": "example", "count": count, "least": 0.23}
    return made("examples", variables, **coords).assign_attrs(about)


def clusters() -> xr.Dataset:
    stretch, count = np.arange(4) * 15, 9
    variables: dict[str, Any] = {
        "size": ("cluster_number", [5, 4, 0]),
        "trajectory": (("cluster_number", "stretch", "layer"), noise(3, 4, 3)),
        "loss": (("cluster_number", "stretch"), 2 + noise(3, 4)),
        "loss_start": ("cluster_number", [2.3, 2.2, np.nan]),
        "cluster": ("example", np.arange(count) % 2),
        "left_out_share": ("k", [1.0, 0.4, 0.3]),
        "null_share": ("draw", [0.5, 0.6]),
        "p": ((), 1 / 3),
        "stability": ("pair", [0.9]),
        "stability_mean": ((), 0.9),
    }
    coords: dict[str, Any] = {
        "layer": list(LAYERS),
        "k": [1, 2, 3],
        "cluster_number": [0, 1, 2],
        "example": np.arange(count),
        "central_example": ("cluster_number", [4, 7, 0]),
        "central_text": ("cluster_number", ["a $four$", "_seven", ""]),
        "stretch_start": ("stretch", stretch),
        "stretch_end": ("stretch", stretch + 15),
    }
    found = made("clusters", variables, **coords)
    found["trajectory"][2] = found["loss"][2] = np.nan
    return found.assign_attrs(per="example", clusters=3)


def compare(runs: tuple[int, ...] = (3, 1)) -> xr.Dataset:
    names = ["adam", "_sgd$"][: len(runs)]
    each = noise(len(runs), 3, max(runs))
    for at, count in enumerate(runs):
        each[at, :, count:] = np.nan
    mean = np.nanmean(each, axis=-1)
    half = np.where(np.array(runs)[:, None] > 1, 0.4, np.nan) + np.zeros(3)
    variables: dict[str, Any] = {
        "mean": (("label", "layer"), mean),
        "low": (("label", "layer"), mean - half),
        "high": (("label", "layer"), mean + half),
        "p": (("label", "layer"), np.where(np.isnan(half), np.nan, 0.01)),
        "p_holm": (("label", "layer"), np.where(np.isnan(half), np.nan, 0.03)),
        "total": (("label", "layer", "run"), each),
        "path_band": (("label", "layer"), np.full_like(mean, np.nan)),  # of single steps
        "runs": ("label", list(runs)),
    }
    return made("compare", variables, label=names, layer=list(LAYERS))


def microscope(groups: bool = False) -> xr.Dataset:
    shapes = {
        "fc1.weight": (10, 78),
        "fc1.bias": (10, 1),
        "_fc$2.weight": (4, 10),
        "_fc$2.bias": (4, 1),
        "scale": (1, 1),
    }
    variables: dict[str, Any] = {}
    for name, shape in shapes.items():
        about = {
            "shape": [size for size in shape if size > 1],
            "pool": [1, 1],
            "axes": [[0], [1]],
            "units": "loss",
        }
        values = (1e-4 * noise(STEPS, *shape)).astype("float32")
        variables[name] = (("step", f"{name}:row", f"{name}:column"), values, about)
    loss = np.exp(-np.arange(STEPS + 1) / 4)
    coords = {"step:loss_start": ("step", loss[:-1]), "step:loss_end": ("step", loss[1:])}
    return made("microscope", variables, **coords).assign_attrs(scale=2e-4)


def computed(finding: str, groups: bool = False) -> xr.Dataset:
    """A finding that has no function above: of `quadratic_bowl`, one layer under a hostile name."""
    result: xr.Dataset = getattr(findings, finding)(_run()["groups" if groups else "train"])
    hostile = {
        name: (coord.dims, [str(value).replace("first", "_fc$2") for value in coord.values])
        for name, coord in result.coords.items()
        if coord.dtype.kind in "OU"
    }
    return result.assign_coords(hostile).assign_attrs(loss="tr$ain")


@cache
def _run() -> Run:
    from . import quadratic_bowl

    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LCAWarning)  # that its checkpoints are ten steps apart
        return quadratic_bowl.replay(directory).run


# of every finding, by its name
MADE: dict[str, Callable[..., xr.Dataset]] = {
    name: globals().get(name) or partial(computed, name) for name in declared_findings()
}


# --- of models and runs of any size ---------------------------------------------------------------


def module(at: int) -> str:
    """A name of 60 characters that tells itself from others in its middle."""
    return f"backbone.encoder.stages.{at:03d}.residual_branch.attention_block1"


def large(finding: str, count: int, steps: int) -> xr.Dataset:
    """A finding of so many layers, two tensors and a few units each, over so many steps; numbers of
    many sizes.
    """
    if finding == "microscope":
        return _large_microscope(count, min(steps, 60))
    base, random = MADE[finding](), np.random.default_rng(count)
    tensors = [f"{module(at)}.{part}" for at in range(count) for part in ("weight", "bias")]
    extents = {
        "direction": count,
        "layer": count,
        "tensor": 2 * count,
        "unit": 3 * count,
        "step": steps,
    }
    extents |= {"component": count, "outside_layer": count, "depth": min(steps, 60)}
    if finding == "candidates":
        extents |= {"unit": 20}
    extents = {dim: extent for dim, extent in extents.items() if dim in base.dims}
    many = base.isel({dim: np.arange(extent) % base.sizes[dim] for dim, extent in extents.items()})
    scaled = {}
    for name, variable in many.data_vars.items():
        if (
            variable.dtype.kind == "f"
            and set(extents) & set(variable.dims)
            and finding != "helping"
        ):
            scaled[name] = variable * random.lognormal(0, 1, variable.shape)
    many = many.assign(scaled)
    if "cumulative" in many:
        many["cumulative"] = (many["allocated"].dims, np.cumsum(many["allocated"].values, axis=0))
    modules = [module(at) for at in range(count)]
    names: dict[str, Any] = {"layer": modules, "tensor": tensors, "outside_layer": modules}
    names |= {"direction": modules}
    coords: dict[str, Any] = {dim: names[dim] for dim in names if dim in many.dims}
    if "unit" in many.dims and finding == "units":
        coords |= {"layer": ("unit", [module(at // 3) for at in range(3 * count)])}
    if "component" in many.dims:
        coords |= {"name": ("component", modules), "component": modules}
        coords |= {"depth": np.arange(extents["depth"])}
    if "step" in many.dims:
        coords |= {"step": np.arange(steps), "step_end": ("step", np.arange(steps) + 1)}
    for coord in (
        "worst_name",
        "hero_name",
        "villain_name",
        "parameter_name",
        "parameter",
        "unit_name",
    ):
        if coord in many.coords:
            dim = many[coord].dims[0]
            said = [f"{module(at % count)}.weight[{at}, 1]" for at in range(many.sizes[dim])]
            coords[coord] = (dim, said)
    return many.assign_coords(coords)


def _large_microscope(count: int, steps: int) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for at in range(count):
        for part, shape in (("weight", (6, 4)), ("bias", (6, 1))):
            name = f"{module(at)}.{part}"
            about = {
                "shape": [size for size in shape if size > 1],
                "pool": [1, 1],
                "axes": [[0], [1]],
                "units": "loss",
            }
            values = (1e-4 * noise(steps, *shape)).astype("float32")
            variables[name] = (("step", f"{name}:row", f"{name}:column"), values, about)
    loss = np.exp(-np.arange(steps + 1) / 4)
    start = np.arange(steps)
    coords = {"step:loss_start": ("step", loss[:-1]), "step:loss_end": ("step", loss[1:])}
    data = xr.Dataset(variables, coords={**coords, "step": start, "step_end": ("step", start + 1)})
    about = {
        "finding": "microscope",
        "run": "a.lca",
        "loss": "train",
        "split": "train",
        "left_out": "",
        "scale": 2e-4,
    }
    return data.assign_attrs(about)
