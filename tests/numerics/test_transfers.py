"""Copies to and from a device beside what it computes, on a stand-in that copies as late as it may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lca_posthoc.numerics import statistics
from lca_posthoc.numerics.objective import FromDevice, batches, to_device, transfers
from lca_posthoc.numerics.objective.batches import Split
from lca_posthoc.results import LossResults

from ..helpers.late_device import CUDA, LateDevice, install
from ..helpers.replayed_cases import assert_same_bits
from ..helpers.small_perceptron import replay, train


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    to_device.cache_clear()
    yield install(monkeypatch)
    to_device.cache_clear()


def point() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"weight": (30, 20), "scale": (), "none": (0, 3), "turned": (4, 5)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**tensors, "turned": tensors["turned"].T, "count": torch.tensor(7)}


@pytest.mark.parametrize("at_once", [2**26, 400])
def test_what_is_computed_next_waits_for_the_copies_and_the_host_does_not(
    at_once: int, late: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_AT_ONCE", at_once)
    stored = point()
    coming = to_device(CUDA, "checkpoints").begin(
        lambda copy: {name: copy(tensor) for name, tensor in stored.items()}
    )
    assert not torch.equal(coming.load["weight"], stored["weight"])  # nobody has waited
    there = coming.here()
    assert all(torch.equal(there[name], tensor) for name, tensor in stored.items())
    assert [tensor.stride() for tensor in there.values()] == [
        tensor.stride() for tensor in stored.values()
    ]
    assert late.streams == [late.computing] * len(stored)
    assert late.pinned[:2] == ([600, 1] if at_once > 2400 else [100, 100])


def test_copies_of_one_use_share_a_stream_and_others_do_not(late: LateDevice) -> None:
    assert to_device(CUDA, "batches") is to_device(CUDA, "batches")
    assert to_device(CUDA, "batches")._stream is not to_device(CUDA, "checkpoints")._stream


def test_numbers_leave_as_they_were_though_their_memory_is_used_again(late: LateDevice) -> None:
    leaving, scratch = FromDevice(CUDA), torch.zeros(3)
    places = torch.zeros(4, 3)
    for number, place in enumerate(places):
        leaving.begin(scratch.fill_(number), place)
    assert not places.any()
    leaving.finish()
    assert torch.equal(places, torch.arange(4.0)[:, None].expand(4, 3))
    assert len(late.streams) == 4
    assert late.computing not in late.streams
    leaving.finish()  # nothing is left


def test_a_cpu_copies_at_once() -> None:
    leaving, place = FromDevice(torch.device("cpu")), torch.zeros(3)
    leaving.begin(torch.arange(3.0), place)
    assert torch.equal(place, torch.arange(3.0))


@pytest.mark.parametrize("room", [0, 2**30])
def test_batches_come_whole(room: int, late: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "room_on", lambda device: room)
    inputs, labels = torch.randn(50, 4), torch.arange(50)
    on_cpu = Split("train", (inputs, labels), torch.device("cpu"), torch.float32)
    on_device = Split("train", (inputs, labels), CUDA, torch.float32)
    for _ in range(2):
        pairs = zip(on_device.batches(8), on_cpu.batches(8), strict=True)
        for (_, one), (_, other) in pairs:
            assert all(map(torch.equal, one, other))
    assert len(late.pinned) == 2 * 7 * (1 if room else 2)


def test_allocations_that_leave_late_are_stored_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "ck", 4)
    wanted = replay(tmp_path / "ck", tmp_path / "wanted", losses=["all"], keep="parameters")
    to_device.cache_clear()
    late = install(monkeypatch)
    monkeypatch.setattr(statistics, "FromDevice", lambda device: FromDevice(CUDA))
    run = replay(tmp_path / "ck", tmp_path / "run", losses=["all"], keep="parameters")
    assert late.streams
    for loss in ("train", "classes", "examples"):
        of_loss: Any = run[loss]
        assert isinstance(of_loss, LossResults)
        assert_same_bits(of_loss, wanted[loss])
