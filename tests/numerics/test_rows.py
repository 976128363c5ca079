"""Tensors in rows: the same numbers as one by one, wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lca_posthoc.numerics.objective import InRows, Row, rows_of

SMALL = {"bias": (7,), "scale": (), "none": (0, 3), "weight": (3, 5), "more": (90, 91)}
SHAPES = {"first": (300, 40), **SMALL, "last": (8193,)}
CPU = torch.device("cpu")


def tensors(groups: tuple[int, ...] = ()) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn((*groups, *shape), generator=draw, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def test_small_tensors_lie_together_and_large_ones_alone() -> None:
    rows = rows_of(tensors())
    assert [row.names for row in rows.every] == [("first",), tuple(SMALL), ("last",)]
    assert list(rows.of) == list(SHAPES)
    assert rows_of(tensors()) is rows


@pytest.mark.parametrize("groups", [(), (3,)])
def test_tensors_come_back_from_their_rows(groups: tuple[int, ...]) -> None:
    every, rows = tensors(groups), rows_of(tensors())
    numbers = {row.names[0]: row.of(every, *groups) for row in rows.every}
    if not groups:
        numbers = {name: of_row[0] for name, of_row in numbers.items()}
    back = InRows(rows, numbers)
    assert list(back) == list(every)
    assert all(torch.equal(back[name], tensor) for name, tensor in every.items())
    assert "other" not in back
    (_, together, _) = rows.every
    assert together.of(back, *groups).data_ptr() == numbers["bias"].data_ptr()
    others = Row({name: torch.Size(SHAPES[name]) for name in ("weight", "bias")}, CPU)
    wanted = [every[name].reshape(*(groups or (1,)), -1) for name in ("weight", "bias")]
    assert torch.equal(others.of(back, *groups), torch.cat(wanted, -1))


def test_sums_are_those_of_each_tensor() -> None:
    every = tensors((2,))
    for row in rows_of(tensors()).every:
        wanted = [[float(of_group.sum()) for of_group in every[name]] for name in row.names]
        sums = row.sums(row.of(every, 2)).T
        assert sums.numpy() == pytest.approx(np.array(wanted), rel=1e-12, abs=1e-13)


def test_tensors_that_are_missing_are_0() -> None:
    every, (_, row, _) = tensors(), rows_of(tensors()).every
    some = row.of_some({"weight": every["weight"]})[0]
    assert torch.equal(row.tensor("weight", some), every["weight"])
    assert int(some.count_nonzero()) == 15


def test_rows_stay_small_enough_for_the_cache() -> None:
    many = {f"layer {number}": torch.empty(8000, device="cpu") for number in range(40)}
    sizes = [row.numbers for row in rows_of(many).every]
    assert sizes == [16 * 8000, 16 * 8000, 8 * 8000]
