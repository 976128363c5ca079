"""Analyse repeated blocks, such as the layers of a transformer: components by depth, layers outside
blocks, and attention heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ..base.declarations import GROUPS, TOP, Finding, Option
from ..base.text import count
from ..errors import InputError
from ..results import LossResults
from .common import (
    Numbers,
    Variable,
    about,
    described,
    label_of,
    moving_buffers,
    tables,
    unfinished,
)
from .per_example import open_examples
from .units import in_stretches

FINDING = Finding(
    question="What did the attention, the MLP and the norms of each repeated block do, by depth; "
    "what did each head",
    needs="any run; heads `--keep units`",
    place=25,
    options=(
        GROUPS,
        Option(
            name="heads",
            flag="--heads",
            kind="count",
            metavar="N",
            help="How many attention heads a block has, for a table of heads.",
        ),
        TOP,
    ),
)

_DIGITS = 6  # of a block's number
# the roles of the rows of a weight, in order, by the last part of a module's or parameter's name
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("q", "query", "q_proj", "to_q", "wq", "q_lin", "q_attn"), ("query",)),
    **dict.fromkeys(("k", "key", "k_proj", "to_k", "wk", "k_lin"), ("key",)),
    **dict.fromkeys(("v", "value", "v_proj", "to_v", "wv", "v_lin"), ("value",)),
    **dict.fromkeys(
        ("qkv", "qkv_proj", "c_attn", "to_qkv", "Wqkv", "in_proj_weight", "in_proj_bias"),
        ("query", "key", "value"),
    ),
}


@dataclass(frozen=True, order=True)
class Block:
    """The place of a tensor in a repeated block: the name before its number, the number, and the
    rest of the name.
    """

    stack: str
    depth: int
    rest: str


def block_of(names: Iterable[str]) -> dict[str, Block]:
    """Return the place in a repeated block of every tensor that is in one.

    A number in a name counts blocks if another tensor has the same name except for that number. A
    tensor belongs to the outermost block around it.

    >>> places = block_of(["h.0.attn.w", "h.0.mlp.0.w", "h.1.attn.w", "h.1.mlp.0.w", "h.1.extra", "wte.w"])
    >>> [(name, place.depth, place.rest) for name, place in places.items()][2:]
    [('h.1.attn.w', 1, 'attn.w'), ('h.1.mlp.0.w', 1, 'mlp.0.w'), ('h.1.extra', 1, 'extra')]
    """
    readings = {name: list(_readings(name)) for name in names}
    numbers: dict[tuple[str, str], set[int]] = {}
    for places in readings.values():
        for place in places:
            numbers.setdefault((place.stack, place.rest), set()).add(place.depth)
    among = {
        (one.stack, one.depth)
        for places in readings.values()
        for one in places
        if len(numbers[one.stack, one.rest]) > 1
    }
    outermost = {
        name: next((one for one in places if (one.stack, one.depth) in among), None)
        for name, places in readings.items()
    }
    return {name: place for name, place in outermost.items() if place is not None}


def _readings(name: str) -> Iterator[Block]:
    """Yield a reading of a name for each number in it that is followed by more parts."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if len(part) <= _DIGITS and part.isdecimal() and part.isascii():
            yield Block(".".join(parts[:position]), int(part), ".".join(parts[position + 1 :]))


def blocks(results: LossResults, *, heads: int | None = None) -> xr.Dataset:
    """Return the allocation of each component of each repeated block: a table of components by
    depth.

    Blocks follow from the names of tensors: in `blocks.3.attn.qkv.weight` the component is
    `attn.qkv`, its kernel and its bias together, and the depth is 3 (see `block_of`). Blocks under
    several names, such as an encoder's and a decoder's, are several stacks.

    Args:
        results: one loss of a run, at any level of `--keep`; heads need `--keep units`.
        heads: how many attention heads a block has; weights do not tell, so it is never guessed. A
            head is an equal share of the rows of the projections to queries, keys and values, found
            by their names (`PROJECTIONS`), and of their biases. Projections without separate rows
            for every head, as where heads share keys, are skipped; so is the one after attention,
            whose rows mix heads.

    Returns:
        `total` and `mean` (component, depth[, group]; the mean is per parameter), sums over
        training in units of loss, NaN where a block has no such component, with coordinates
        `stack`, `name` of component and `parameters` (component, depth); `outside`
        (outside_layer[, group]), of the layers in no block, one for each use of a tensor that an
        embedding shares with another operation if the loss has results per example. With `heads`,
        `head_total` (projection, depth, head[, group]), with coordinates `projection_stack` and
        `role`.

    Raises:
        LCAError: if no segment is finished yet, the run keeps no units for heads, or stored numbers
            are damaged.
        InputError: for fewer than one head, or heads where no projection is known.
    """
    table = tables(results)
    names = [str(name) for name in table["tensor"].values]
    places, buffers = block_of(names), moving_buffers(table)
    sums = table["allocated"].sum("step")
    left_out = unfinished(results)
    if not places:
        left_out.append(
            "No two tensors have names that differ only in a number, so there are no blocks."
        )
    group = ("group",) if "group" in sums.dims else ()
    values = sums.transpose("tensor", *group).values
    components = _components(places, buffers)
    depths = sorted({place.depth for place in places.values()})
    variables, parameters = _table(table, values, components, depths, group)
    outside, by_use = dict[str, Numbers](), _by_use(results)
    for position, name in enumerate(names):
        if name not in places:
            layer = label_of(name, "module", buffers)
            parts = {layer: values[position]}
            if name in by_use:
                parts = {f"{layer} ({use})": part for use, part in by_use[name].items()}
            for label, part in parts.items():
                outside[label] = outside.get(label, 0) + part
    variables["outside"] = described(
        (
            ("outside_layer", *group),
            np.array(list(outside.values())).reshape(len(outside), *values.shape[1:]),
        ),
        "loss",
        "Σ allocation over training",
    )
    coords: dict[str, object] = {
        "component": np.array([_joined(*key) for key in components], dtype=object),
        "stack": ("component", np.array([stack for stack, _ in components], dtype=object)),
        "name": ("component", np.array([name for _, name in components], dtype=object)),
        "depth": np.array(depths, dtype=int),
        "parameters": (("component", "depth"), parameters),
        "outside_layer": np.array(list(outside), dtype=object),
        **{name: table[name] for name in ("group", "examples") if name in table.coords},
    }
    if heads is not None:
        of_heads, about_heads = _heads(results, table, places, heads, depths, left_out)
        variables, coords = variables | of_heads, coords | about_heads
    return xr.Dataset(variables, coords=coords, attrs=about(results, "blocks", left_out))


def _by_use(results: LossResults) -> dict[str, dict[str, Numbers]]:
    """Return the allocation of each use of the tensors with separated uses, over training, by
    operation: the weighted mean over examples, () or (groups,).
    """
    if not results.manifest.uses(results.record):
        return {}
    reader = open_examples(results)
    labels, of = results.record.groups, reader.data.coords.get("group")
    sums = np.zeros((1 if labels is None else len(labels), reader.data.sizes["use"]))
    weights = np.zeros(len(sums))
    for part in reader.blocks():
        shares = np.zeros((part.stop - part.start, reader.data.sizes["use"]))
        for rows in reader.rows():
            stored = reader.data["uses"].isel(step=rows, example=part)
            shares += stored.transpose("step", "example", "use").values.sum(0, dtype=np.float64)
        member = np.ones((1, len(shares)))
        if labels is not None and of is not None:
            member = (of.values[part] == np.array(labels)[:, None]).astype(float)
        weighted = member * reader.weights(part)
        sums, weights = sums + weighted @ shares, weights + weighted.sum(1)
    means = sums / weights[:, None]
    by_use: dict[str, dict[str, Numbers]] = {}
    names, operations = (reader.data[name].values for name in ("used_tensor", "operation"))
    for use, (name, operation) in enumerate(zip(names, operations, strict=True)):
        mean = means[0, use] if labels is None else means[:, use]
        by_use.setdefault(str(name), {})[str(operation)] = mean
    return by_use


def _joined(stack: str, name: str) -> str:
    """Return the name of a component of a stack, for all depths."""
    return f"{stack}.*.{name}".removeprefix(".")


def _components(
    places: Mapping[str, Block], buffers: set[str]
) -> dict[tuple[str, str], dict[int, list[str]]]:
    """Return the names of the tensors of each component, by stack and name, then by depth."""
    components: dict[tuple[str, str], dict[int, list[str]]] = {}
    for name, place in places.items():
        own = {place.rest} if name in buffers else ()
        key = (place.stack, label_of(place.rest, "module", own))
        components.setdefault(key, {}).setdefault(place.depth, []).append(name)
    stacks = list(dict.fromkeys(stack for stack, _ in components))
    return dict(sorted(components.items(), key=lambda entry: stacks.index(entry[0][0])))


def _table(
    table: xr.Dataset,
    values: Numbers,
    components: Mapping[tuple[str, str], Mapping[int, list[str]]],
    depths: list[int],
    group: tuple[str, ...],
) -> tuple[dict[str, Variable], Numbers]:
    """Return the sums and means of components by depth, and their numbers of parameters."""
    position = {str(name): place for place, name in enumerate(table["tensor"].values)}
    shape = (len(components), len(depths))
    total = np.full((*shape, *values.shape[1:]), np.nan)
    elements = np.zeros(shape, dtype=int)
    for row, by_depth in enumerate(components.values()):
        for depth, members in by_depth.items():
            picked = [position[name] for name in members]
            total[row, depths.index(depth)] = values[picked].sum(axis=0)
            elements[row, depths.index(depth)] = int(table["elements"].values[picked].sum())
    per = np.maximum(1, elements).reshape(*shape, *(1 for _ in group))
    dims = ("component", "depth", *group)
    variables = {
        "total": described((dims, total), "loss", "Σ allocation over training"),
        "mean": described((dims, total / per), "loss", "allocation per parameter over training"),
    }
    return variables, elements


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """A tensor whose rows produce queries, keys or values, one after the other.

    `rows` is the number of rows of each role; `columns` the number of inputs of a row, None for a
    bias.
    """

    name: str
    place: Block
    roles: tuple[str, ...]
    rows: int
    columns: int | None

    @property
    def attention(self) -> tuple[str, int, str]:
        """Return the attention it belongs to: its stack, its depth, the module that holds it."""
        return self.place.stack, self.place.depth, _around(self.place.rest)


def _heads(
    results: LossResults,
    table: xr.Dataset,
    places: Mapping[str, Block],
    heads: int,
    depths: list[int],
    left_out: list[str],
) -> tuple[dict[str, Variable], dict[str, object]]:
    """Return the sums of each head of each projection, and their coordinates.

    Raises:
        InputError: if no projection is known, or none has rows for so many heads.
    """
    if heads < 1:
        raise InputError(f"a block has at least one head, got {heads}.")
    results.require("units", "attention heads")
    projections = list(_projections(results, places))
    if not projections:
        ends = ", ".join(list(PROJECTIONS)[:4])
        raise InputError(
            "no tensor in a block is known to project to queries, keys or values; their modules "
            f"would be called {ends} or similar. Heads cannot be separated."
        )
    telling = _telling(projections, heads)
    other = [one for one in projections if one not in telling]
    if not telling:
        raise InputError(
            f"no projection has rows for {count(heads, 'head')} of its own, such as "
            f"{other[0].name} with {count(other[0].rows, 'row')} for each role. Name the number of "
            "heads of the model."
        )
    if other:
        left_out.append(
            f"{count(len(other), 'tensor')} that project to queries, keys or values, such as "
            f"{other[0].name}, do not have equal rows for {heads} heads of their own."
        )
    units, borders = results.units, np.array([0, table.sizes["step"]])
    group = ("group",) if "group" in units.dims else ()
    extent = tuple(units.sizes[name] for name in group)
    sums: dict[tuple[str, str, str], Numbers] = {}
    for one in telling:
        summed = in_stretches(units[one.name], borders, results.manifest.span)[0]
        by_head = summed.reshape(*extent, len(one.roles), heads, -1).sum(axis=-1)
        for position, role in enumerate(one.roles):
            key, depth = (one.place.stack, one.attention[2], role), depths.index(one.place.depth)
            whole = sums.setdefault(key, np.full((len(depths), heads, *extent), np.nan))
            before = np.nan_to_num(whole[depth])  # of the kernel, if this is its bias
            whole[depth] = before + np.moveaxis(by_head[..., position, :], -1, 0)
    names = [_joined(stack, f"{module}.{role}".lstrip(".")) for stack, module, role in sums]
    variable = described(
        (("projection", "depth", "head", *group), np.array(list(sums.values()))),
        "loss",
        "Σ allocation over training",
    )
    return {"head_total": variable}, {
        "projection": np.array(names, dtype=object),
        "projection_stack": ("projection", np.array([key[0] for key in sums], dtype=object)),
        "role": ("projection", np.array([key[2] for key in sums], dtype=object)),
        "head": np.arange(heads),
    }


def _projections(results: LossResults, places: Mapping[str, Block]) -> Iterator[_Projection]:
    """Yield the tensors of blocks whose names mark projections to queries, keys or values."""
    for tensor in results.manifest.allocated:
        spec = tensor.spec
        place = places.get(spec.name)
        roles = _roles(place.rest) if place is not None else ()
        if place is not None and roles and spec.unit_axis is not None:
            units = spec.shape[spec.unit_axis]
            if units % len(roles) == 0:
                yield _Projection(
                    name=spec.name,
                    place=place,
                    roles=roles,
                    rows=units // len(roles),
                    columns=spec.elements // units if len(spec.shape) > 1 else None,
                )


def _telling(projections: list[_Projection], heads: int) -> list[_Projection]:
    """Return the projections whose rows are `heads` equal parts, each of one head.

    Keys and values must have as many rows as the queries of their attention; with fewer, heads
    share them. If one tensor produces queries, keys and values, only a square matrix for each shows
    that. A bias follows its kernel.
    """
    kernels = [one for one in projections if one.columns is not None and one.rows % heads == 0]
    queries = {one.attention: one.rows for one in kernels if one.roles == ("query",)}
    good = [
        one
        for one in kernels
        if (
            queries.get(one.attention) == one.rows
            if len(one.roles) == 1
            else one.attention not in queries and one.rows == one.columns
        )
    ]
    with_kernel = {(one.attention, one.roles, one.rows) for one in good}
    return [one for one in projections if (one.attention, one.roles, one.rows) in with_kernel]


def _roles(rest: str) -> tuple[str, ...]:
    """Return the roles of the rows of a tensor in a block; () if unknown.

    >>> _roles("attn.c_attn.weight"), _roles("self_attn.in_proj_bias"), _roles("mlp.c_fc.weight")
    (('query', 'key', 'value'), ('query', 'key', 'value'), ())
    """
    *modules, last = rest.split(".")
    if last in PROJECTIONS:
        return PROJECTIONS[last]
    return PROJECTIONS.get(modules[-1], ()) if modules else ()


def _around(rest: str) -> str:
    """Return the module that holds a projection.

    >>> _around("attn.c_attn.weight"), _around("self_attn.in_proj_bias"), _around("q.weight")
    ('attn', 'self_attn', '')
    """
    *modules, last = rest.split(".")
    return ".".join(modules if last in PROJECTIONS else modules[:-1])
