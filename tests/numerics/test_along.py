"""Numerics 12: the loss along directions, and what is left beside them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lca_posthoc import run
from lca_posthoc.checkpoints.basis import write_basis
from lca_posthoc.errors import InputError, SpanError
from lca_posthoc.replay.events import silent
from lca_posthoc.results import Run

from ..helpers.small_perceptron import examples, network, task, train, value

STEPS = 6


@pytest.fixture(scope="module")
def iterates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("iterates") / "iterates", STEPS)


def replay(iterates: Path, along: Path | None, out: Path, **options: object) -> Run:
    chosen = {"losses": ["all"], "cluster": "inline", "tolerance": "inf", "progress": silent}
    return run(iterates, task(), out=out, along=along, **{**chosen, **options})  # type: ignore[arg-type]


def whole_basis(place: Path) -> tuple[Path, np.ndarray]:
    """A rotation of all parameters as a file of directions, and as a matrix."""
    shapes = {name: parameter.shape for name, parameter in network().named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    generator = torch.Generator().manual_seed(2)
    rotation, _ = torch.linalg.qr(torch.randn(sum(sizes), sum(sizes), generator=generator).double())
    parts = zip(shapes, rotation.split(sizes, 1), strict=True)
    tensors = {name: part.reshape(-1, *shapes[name]).contiguous() for name, part in parts}
    save_file(tensors, place)
    return place, rotation.numpy()


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    names = [name for name, _ in network().named_parameters()]
    return torch.cat([tensors[name].flatten() for name in names]).double().numpy()


def gradient_at(weights: np.ndarray) -> np.ndarray:
    model, (inputs, targets) = network().double(), examples()
    vector = torch.from_numpy(weights.copy())
    nn.utils.vector_to_parameters(vector, model.parameters())
    value(model(inputs.double()), targets).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()


def segments(iterates: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    files = sorted(iterates.glob("*.safetensors"))
    yield from itertools.pairwise(flat(load_file(file)) for file in files)


def oracle(iterates: Path, basis: np.ndarray) -> np.ndarray:
    """⟨b, Δθ⟩⟨b, ḡ⟩ of every direction and segment by Simpson's rule, float64."""
    rows = []
    for start, end in segments(iterates):
        gradients = [gradient_at(start + x * (end - start)) for x in (0.0, 0.5, 1.0)]
        mean = (gradients[0] + 4 * gradients[1] + gradients[2]) / 6
        rows.append((basis @ (end - start)) * (basis @ mean))
    return np.array(rows)


@pytest.mark.parametrize("keep", ["tensors", "units", "statistics", "parameters"])
def test_numerics_12_a_whole_basis_turns_the_allocation(
    iterates: Path, tmp_path: Path, keep: str
) -> None:
    place, rotation = whole_basis(tmp_path / "whole.safetensors")
    along = replay(iterates, place, tmp_path / "run", keep=keep)["train"].along
    expected = oracle(iterates, rotation)
    error = np.abs(along["allocated"] - expected).sum() / np.abs(expected).sum()
    assert error <= 1e-5
    assert np.abs(along["remainder"]).max() <= 1e-6 * np.abs(expected).sum()
    assert along["captured"].to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_numerics_12_the_remainder_closes(iterates: Path, tmp_path: Path) -> None:
    basis = tmp_path / "basis.safetensors"
    write_basis(iterates, basis, directions=2, say=lambda note: None)
    opened = replay(iterates, basis, tmp_path / "run", keep="tensors")
    for loss in opened:
        results = opened[loss]
        directions = results.along["allocated"].sum("direction")
        whole = results.tensors["allocated"].sum("tensor")
        np.testing.assert_allclose(directions + results.along["remainder"], whole, atol=1e-15)
    of_groups = opened["classes"].along["allocated"]
    weight = opened["classes"].steps["weight"]
    mean = (of_groups * weight).sum("group") / weight.sum("group")
    np.testing.assert_allclose(mean, opened["train"].along["allocated"], atol=1e-7)


def test_leading_displacements_hold_more_of_the_motion_than_random_directions(
    iterates: Path, tmp_path: Path
) -> None:
    captured = []
    for name, options in (("leading", {"directions": 2}), ("random", {"random": 2})):
        basis = tmp_path / f"{name}.safetensors"
        write_basis(iterates, basis, say=lambda note: None, **options)  # type: ignore[arg-type]
        along = replay(iterates, basis, tmp_path / name, losses=["train"])["train"].along
        squares = (along["motion"] ** 2).sum() / (along["distance"] ** 2).sum()
        captured.append(float(squares))
    assert captured[0] > 0.9 > captured[1]


def test_small_steps_agree_with_the_formula_of_second_order(tmp_path: Path) -> None:
    """A_b = ⟨b, Δθ⟩(⟨b, g⟩ + ½⟨b, HΔθ⟩) + O(Δθ³), with HΔθ from a difference of gradients."""
    iterates = train(tmp_path / "iterates", STEPS, learning_rate=1e-3)
    place, rotation = whole_basis(tmp_path / "whole.safetensors")
    opened = replay(iterates, place, tmp_path / "run", precision="float64", losses=["train"])
    allocated = opened["train"].along["allocated"].to_numpy()
    for row, (start, end) in enumerate(segments(iterates)):
        motion, gradient = end - start, gradient_at(start)
        small = 1e-4
        curvature = (gradient_at(start + small * motion) - gradient) / small
        expected = (rotation @ motion) * (rotation @ (gradient + curvature / 2))
        assert np.abs(allocated[row] - expected).sum() <= 1e-5 * np.abs(expected).sum()


def bytes_along(opened: Run, losses: Sequence[str]) -> dict[str, bytes]:
    return {loss: opened[loss].along["allocated"].to_numpy().tobytes() for loss in losses}


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_bits_do_not_depend_on_spans_or_on_when_a_loss_came(
    iterates: Path, tmp_path: Path, keep: str
) -> None:
    basis = tmp_path / "basis.safetensors"
    write_basis(iterates, basis, directions=3, say=lambda note: None)
    both = ["train", "examples"]
    together = replay(
        iterates, basis, tmp_path / "one", keep=keep, span=8, causes=True, losses=both
    )
    expected = bytes_along(together, both)
    for losses in (["train"], both):
        grown = replay(
            iterates,
            basis if losses == ["train"] else None,
            tmp_path / "two",
            keep=keep,
            span=1,
            causes=True,
            losses=losses,
        )
    assert bytes_along(grown, both) == expected
    causes = [opened["train"].causes["allocated"].to_numpy() for opened in (together, grown)]
    assert causes[0].tobytes() == causes[1].tobytes()


def test_other_directions_than_recorded_are_refused(iterates: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first.safetensors", tmp_path / "other.safetensors"
    write_basis(iterates, first, directions=2, say=lambda note: None)
    write_basis(iterates, other, directions=3, say=lambda note: None)
    out = tmp_path / "run"
    replay(iterates, first, out, losses=["train"])
    with pytest.raises(InputError, match="other directions than this run was made with"):
        replay(iterates, other, out, losses=["classes"])
    with pytest.raises(InputError, match="other directions than this run was made with"):
        replay(iterates, other, out, losses=["train"])  # which is finished
    shutil.copy(first, tmp_path / "moved.safetensors")
    opened = replay(iterates, tmp_path / "moved.safetensors", out, losses=["classes"])
    assert set(opened) == {"train", "classes"}


def test_directions_that_changed_on_the_way_fail_their_spans(
    iterates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lca_posthoc.checkpoints import directions_file

    basis, other = tmp_path / "basis.safetensors", tmp_path / "other.safetensors"
    write_basis(iterates, basis, random=2, seed=7, say=lambda note: None)
    write_basis(iterates, other, random=2, seed=8, say=lambda note: None)
    opened = directions_file.open_directions

    times = itertools.count()

    def changed(path: str, *others: object) -> object:
        if next(times):  # the driver has opened it before
            shutil.copy(other, path)
        return opened(path, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(directions_file, "open_directions", changed)
    with pytest.raises(SpanError, match="other directions than this run was made with"):
        replay(iterates, basis, tmp_path / "run", losses=["train"])


def test_a_run_without_directions_says_so(iterates: Path, tmp_path: Path) -> None:
    opened = replay(iterates, None, tmp_path / "run", losses=["train"])
    with pytest.raises(InputError, match="made without --along"):
        opened["train"].along  # noqa: B018
    basis = tmp_path / "basis.safetensors"
    write_basis(iterates, basis, directions=2, say=lambda note: None)
    with pytest.raises(InputError, match="made without --along"):
        replay(iterates, basis, tmp_path / "run", losses=["train"])


def test_directions_of_another_model_are_refused(iterates: Path, tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(2, 4, 5)}, tmp_path / "shape.safetensors")
    with pytest.raises(InputError, match="shape"):
        replay(iterates, tmp_path / "shape.safetensors", tmp_path / "run")
    with pytest.raises(InputError, match="cannot read"):
        replay(iterates, tmp_path / "missing.safetensors", tmp_path / "run")
