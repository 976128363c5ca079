"""Directions in which training moved the weights, against numpy's singular value decomposition of the
whole matrix of displacements; random ones; what has none.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lca_posthoc.checkpoints import basis as basis_module
from lca_posthoc.checkpoints import directions_writer
from lca_posthoc.checkpoints.basis import Basis, write_basis
from lca_posthoc.checkpoints.directions_file import MAX_DIRECTIONS, open_directions
from lca_posthoc.checkpoints.displacements import BlockSize, Displacements
from lca_posthoc.checkpoints.trajectory import open_trajectory
from lca_posthoc.errors import InputError, ResourceError

Tensors = Mapping[str, torch.Tensor]
Matrix = NDArray[np.float64]

SMALL = BlockSize(3, 7)  # several blocks of rows, tensors cut and tensors that share a block
LARGE = BlockSize(1000, 10**6)
MOVING = ("fc.bias", "fc.weight", "out.weight", "scale")


def iterates(count: int = 12, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Weights that drift, each step another length, with what must have no part beside them."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"fc.weight": (5, 6), "fc.bias": (5,), "out.weight": (2, 3, 4), "scale": ()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drift = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    states = []
    for step in range(count):
        states.append(
            {name: tensor.to(dtype) for name, tensor in state.items()}
            | {
                "frozen": torch.ones(3, 3, dtype=dtype),
                "norm.running_mean": torch.full((5,), float(step)),
                "norm.num_batches_tracked": torch.tensor(step),
                "empty": torch.zeros(0, 3),
            }
        )
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            state[name] = state[name] + 0.1 / (step + 1) * (drift[name] + noise)
    return states


def record(place: Path, states: list[dict[str, torch.Tensor]]) -> Path:
    place.mkdir()
    for step, state in enumerate(states):
        save_file(state, place / f"step_{step:08d}.safetensors", metadata={"step": str(step)})
    return place


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return record(tmp_path / "ck", iterates())


def silent(text: str) -> None:
    """Say nothing."""


def flat(tensors: Tensors, names: tuple[str, ...]) -> Matrix:
    """Some tensors side by side, (rows, elements)."""
    rows = len(next(iter(tensors.values())))
    parts = [tensors[name].double().reshape(rows, -1).numpy() for name in names]
    return np.concatenate(parts, axis=1)


def displacements(states: list[dict[str, torch.Tensor]], names: tuple[str, ...] = MOVING) -> Matrix:
    stacked = {name: torch.stack([state[name].double() for state in states]) for name in names}
    return np.diff(flat(stacked, names), axis=0)


def singular(rows: Matrix) -> tuple[Matrix, Matrix]:
    """Singular values, and right singular vectors that point to where training went."""
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    return values, vectors * np.sign(vectors @ rows.sum(axis=0))[:, None]


@pytest.mark.parametrize("size", [SMALL, LARGE, None])
def test_directions_are_the_right_singular_vectors_of_all_displacements(
    checkpoints: Path, tmp_path: Path, size: BlockSize | None
) -> None:
    out = tmp_path / "b.safetensors"
    basis = write_basis(checkpoints, out, directions=6, say=silent, size=size)
    rows = displacements(iterates())
    values, vectors = singular(rows)
    (part,) = basis.parts
    assert part.singular_values == pytest.approx(values[:10], rel=1e-9)
    assert flat(load_file(out), MOVING) == pytest.approx(vectors[:6], abs=1e-5)
    assert basis.motion == pytest.approx((rows**2).sum(), rel=1e-12)
    for number in (1, 2, 5, 10):
        captured = (values[:number] ** 2).sum() / (rows**2).sum()
        assert part.share(number) == pytest.approx(captured, rel=1e-9)


def test_blocks_of_any_size_give_the_same_products(checkpoints: Path, tmp_path: Path) -> None:
    sizes = (SMALL, LARGE, BlockSize(1, 1), BlockSize(11, 3))
    made = [
        write_basis(checkpoints, tmp_path / f"{number}", say=silent, size=size)
        for number, size in enumerate(sizes)
    ]
    for basis in made[1:]:
        assert basis.parts[0].singular_values == pytest.approx(
            made[0].parts[0].singular_values, rel=1e-12
        )
        first, second = (load_file(one.path) for one in (made[0], basis))
        assert flat(first, MOVING) == pytest.approx(flat(second, MOVING), abs=3e-7)


def test_directions_are_orthonormal_and_training_went_along_them(
    checkpoints: Path, tmp_path: Path
) -> None:
    write_basis(checkpoints, tmp_path / "b", say=silent)
    directions = flat(load_file(tmp_path / "b"), MOVING)
    assert directions @ directions.T == pytest.approx(np.eye(10), abs=3e-7)
    assert ((directions @ displacements(iterates()).sum(axis=0)) > 0).all()


def test_where_training_comes_back_the_largest_displacement_tells_the_sign(tmp_path: Path) -> None:
    place = record(tmp_path / "ck", [{"w": torch.tensor([0.0, float(x)])} for x in (0, 3, 1, 0)])
    write_basis(place, tmp_path / "b", say=silent)
    assert load_file(tmp_path / "b")["w"].tolist() == [[0.0, 1.0]]


def test_every_matrix_has_directions_of_its_own(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    basis = write_basis(checkpoints, out, per_matrix=True, directions=2, say=silent, size=SMALL)
    tensors = load_file(out)
    assert {*tensors} == {"fc.weight", "out.weight"}
    for part, rows in zip(basis.parts, ([0, 1], [2, 3]), strict=True):
        assert part.name is not None
        assert [*part.directions] == rows
        own = displacements(iterates(), (part.name,))
        values, vectors = singular(own)
        assert part.singular_values == pytest.approx(values[:10], rel=1e-8)
        assert flat(tensors, (part.name,))[rows] == pytest.approx(vectors[:2], abs=1e-5)
        others = [row for row in range(4) if row not in rows]
        assert not flat(tensors, (part.name,))[others].any()
        assert part.share(2) == pytest.approx((values[:2] ** 2).sum() / (own**2).sum())
    assert basis.motion == pytest.approx((displacements(iterates()) ** 2).sum())
    assert (("fc.bias", "scale"), "of fewer than two axes") in reasons(basis)


def reasons(basis: Basis) -> list[tuple[tuple[str, ...], str]]:
    return [(some.names, some.reason) for some in basis.left_out]


def test_what_has_no_part_is_named(checkpoints: Path, tmp_path: Path) -> None:
    basis = write_basis(checkpoints, tmp_path / "b", say=silent)
    assert basis.tensors == MOVING
    assert reasons(basis) == [
        (("norm.num_batches_tracked",), "no floating numbers"),
        (("norm.running_mean",), "running statistics of normalisation layers"),
        (("empty", "frozen"), "not moving"),
    ]


def test_the_file_says_what_it_holds(checkpoints: Path, tmp_path: Path) -> None:
    basis = write_basis(checkpoints, tmp_path / "b", directions=3, say=silent)
    with safe_open(tmp_path / "b", "pt") as file:
        stated = json.loads(file.metadata()["directions"])
    assert stated["kind"] == "displacements"
    assert stated["labels"] == [f"displacements {number}" for number in range(3)]
    assert stated["singular_values"] == list(basis.parts[0].singular_values[:3])
    shapes = {name: tuple(tensor.shape) for name, tensor in iterates()[0].items()}
    opened = open_directions(tmp_path / "b", shapes)
    assert (opened.directions, opened.about.labels) == (3, tuple(stated["labels"]))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- random directions ----------------------------------------------------------------------------


@pytest.mark.parametrize("per_matrix", [False, True])
def test_random_directions_are_orthonormal_and_the_same_for_the_same_seed(
    checkpoints: Path, tmp_path: Path, per_matrix: bool
) -> None:
    for name, seed, size in (("a", 5, LARGE), ("b", 5, LARGE), ("c", 6, LARGE), ("d", 5, SMALL)):
        write_basis(
            checkpoints,
            tmp_path / name,
            random=4,
            seed=seed,
            per_matrix=per_matrix,
            say=silent,
            size=size,
        )
    names = ("fc.weight", "out.weight") if per_matrix else MOVING
    a, c, d = (flat(load_file(tmp_path / name), names) for name in "acd")
    assert a @ a.T == pytest.approx(np.eye(len(a)), abs=3e-7)
    assert len(a) == (8 if per_matrix else 4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.abs(a - c).max() > 0.1
    assert a == pytest.approx(d, abs=3e-7)


def test_random_directions_lie_over_what_moves_alone(checkpoints: Path, tmp_path: Path) -> None:
    basis = write_basis(checkpoints, tmp_path / "r", random=4, say=silent)
    assert {*load_file(tmp_path / "r")} == {*MOVING}
    assert (basis.kind, basis.seed, basis.directions) == ("random", 0, 4)
    assert basis.parts[0].share(4) == 4 / basis.parts[0].parameters == 4 / 60
    assert basis.motion == pytest.approx((displacements(iterates()) ** 2).sum())


def test_random_directions_capture_what_is_said_on_average(
    checkpoints: Path, tmp_path: Path
) -> None:
    """400 directions of 60 capture a fixed motion with a standard error of 6 per cent of 1/60."""
    rows = displacements(iterates())
    shares = []
    for seed in range(40):
        basis = write_basis(checkpoints, tmp_path / f"{seed}", random=10, seed=seed, say=silent)
        along = rows @ flat(load_file(basis.path), MOVING).T
        shares.append((along**2).sum() / (rows**2).sum())
    assert np.mean(shares) == pytest.approx(basis.parts[0].share(10), rel=0.15)


# --- checkpoints of other kinds -------------------------------------------------------------------


def test_the_second_name_of_a_tied_tensor_counts_once(tmp_path: Path) -> None:
    states = iterates()
    tied = record(tmp_path / "tied", [s | {"head": s["fc.weight"].clone()} for s in states])
    single = record(tmp_path / "single", states)
    first = write_basis(tied, tmp_path / "a", say=silent)
    second = write_basis(single, tmp_path / "b", say=silent)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.motion == second.motion
    assert (("head",), "second names of tied tensors") in reasons(first)


def test_tensors_in_several_files_and_under_other_names_are_read(tmp_path: Path) -> None:
    whole = record(tmp_path / "whole", iterates())
    for step, state in enumerate(iterates()):
        place = tmp_path / "sharded" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        weights = {}
        for number, name in enumerate(state):
            file = f"model-{number % 2 + 1:05d}-of-00002.safetensors"
            weights[f"module.{name}"] = file
        for file in {*weights.values()}:
            some = {name: state[name[7:]] for name, where in weights.items() if where == file}
            save_file(some, place / file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    write_basis(whole, tmp_path / "a", say=silent)
    write_basis(tmp_path / "sharded", tmp_path / "b", say=silent)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_steps_and_names_are_chosen_as_for_a_run(checkpoints: Path, tmp_path: Path) -> None:
    basis = write_basis(
        checkpoints, tmp_path / "b", steps="2:10:4", rename=["^out=head", "^fc.*="], say=silent
    )
    states = [iterates()[step] for step in (2, 6, 10)]
    values, vectors = singular(displacements(states, ("out.weight", "scale")))
    assert basis.steps == (2, 10)
    assert basis.parts[0].singular_values == pytest.approx(values, rel=1e-8)
    found = flat(load_file(tmp_path / "b"), ("head.weight", "scale"))
    assert found == pytest.approx(vectors, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    states, notes = iterates(dtype=dtype), list[str]()
    place = record(tmp_path / "ck", states)
    basis = write_basis(place, tmp_path / "b", directions=2, say=notes.append)
    values, _ = singular(displacements(states))
    assert basis.parts[0].singular_values == pytest.approx(values[:10], rel=1e-8)
    assert any("half precision" in note for note in notes) == (dtype == torch.bfloat16)


# --- memory ---------------------------------------------------------------------------------------


def peak(place: Path, elements: int, **options: int) -> int:
    """The most bytes of arrays that are held, after a first call has loaded what it needs."""
    torch.manual_seed(0)
    states = [{"w": torch.randn(elements), "v": torch.randn(elements, 1)} for _ in range(7)]
    place.mkdir()
    record(place / "ck", states)
    size = BlockSize(2, 1000)
    write_basis(place / "ck", place / "first", say=silent, size=size, **options)
    tracemalloc.start()
    try:
        write_basis(place / "ck", place / "second", say=silent, size=size, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [{}, {"random": 3}])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, options: dict[str, int]) -> None:
    few = peak(tmp_path / "few", 50_000, **options)
    many = peak(tmp_path / "many", 400_000, **options)
    assert many < few + 2**17
    assert many < 4 * 400_000  # less than one tensor


@pytest.mark.parametrize("size", [SMALL, BlockSize(5, 64), BlockSize(2, 10**6)])
def test_blocks_keep_their_size_and_every_element_is_in_one(
    checkpoints: Path, size: BlockSize
) -> None:
    source = Displacements(open_trajectory(checkpoints), size)
    seen = dict.fromkeys(MOVING, 0)
    for block in source.blocks(MOVING):
        assert sum(piece.width for piece in block) <= size.columns
        for segments in source.row_blocks():
            assert len(source.rows(block, segments)) <= size.rows
        for piece in block:
            assert piece.start == seen[piece.name]
            seen[piece.name] = piece.stop
    assert seen == {name: iterates()[0][name].numel() for name in MOVING}


@pytest.mark.parametrize("size", [SMALL, BlockSize(2, 10**6)])
def test_no_displacement_runs_from_one_range_of_steps_to_the_next(
    checkpoints: Path, size: BlockSize
) -> None:
    states = iterates()
    source = Displacements(open_trajectory(checkpoints, steps="0:1,4:6,9"), size)
    pairs = [(0, 1), (4, 5), (5, 6), (6, 9)]
    assert source.segments == len(pairs)
    for block in source.blocks(MOVING):
        moved = np.concatenate([source.rows(block, rows) for rows in source.row_blocks()])
        expected = [
            np.concatenate(
                [
                    (states[end][piece.name].double() - states[start][piece.name].double())
                    .flatten()[piece.start : piece.stop]
                    .numpy()
                    for piece in block
                ]
            )
            for start, end in pairs
        ]
        np.testing.assert_array_equal(moved, expected)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"directions": 0}, "--directions 0 is not from 1"),
        ({"random": MAX_DIRECTIONS + 1}, "is not from 1 to 1,024"),
        ({"directions": 12}, "11 independent directions"),
        ({"directions": 3, "random": 3}, "give one of them"),
        ({"seed": 3}, "give --random too"),
        ({"random": 3, "seed": -1}, "--seed -1"),
        ({"random": 61}, "only 60 parameters move"),
        ({"random": 25, "per_matrix": True}, "only 24 parameters move of tensor 'out.weight'"),
        ({"directions": 600, "per_matrix": True}, "1,800 directions"),
        ({"rename": ["^(fc.*|out.*|scale)$="]}, "no parameter moves from step 0 to step 11"),
        ({"rename": ["^(fc|out).weight$="], "per_matrix": True}, "no tensor of two axes or more"),
    ],
)
def test_what_cannot_be_is_refused(
    checkpoints: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        write_basis(checkpoints, tmp_path / "b", say=silent, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_checkpoints_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    place = record(tmp_path / "ck", [iterates()[0]] * 3)
    for options in ({}, {"random": 2}, {"per_matrix": True}):
        with pytest.raises(InputError, match="hold the same numbers"):
            write_basis(place, tmp_path / "b", say=silent, **options)  # type: ignore[arg-type]


def test_a_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    states = iterates()
    states[4]["fc.bias"][2] = torch.nan
    place = record(tmp_path / "ck", states)
    with pytest.raises(InputError, match=r"'fc.bias' holds NaN or Inf in .*step 4\)"):
        write_basis(place, tmp_path / "b", say=silent)
    basis = write_basis(place, tmp_path / "b", rename=["^fc.bias$="], say=silent)
    assert "fc.bias" not in basis.tensors


def test_a_checkpoint_that_changes_meanwhile_is_refused(checkpoints: Path) -> None:
    trajectory = open_trajectory(checkpoints)
    source = Displacements(trajectory, SMALL)
    block = next(source.blocks(MOVING))
    source.rows(block, slice(0, 3))
    path = checkpoints / "step_00000002.safetensors"
    save_file(iterates()[3], path, metadata={"step": "2"})
    with pytest.raises(InputError, match=r"\(step 2\) changed while it was read"):
        source.rows(block, slice(0, 3))
    with pytest.raises(InputError, match=r"\(step 2\) changed while it was read"):
        Displacements(trajectory, SMALL)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .* \(step 2\)"):
        source.rows(block, slice(0, 3))


def test_nothing_is_written_over_or_among_the_checkpoints(
    checkpoints: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        write_basis(checkpoints, tmp_path / "b", say=silent)
    assert (tmp_path / "b").read_text() == "mine"
    with pytest.raises(InputError, match="read as one of them"):
        write_basis(checkpoints, checkpoints / "b.safetensors", say=silent)
    with pytest.raises(InputError, match="read as one of them"):
        write_basis(checkpoints, checkpoints / "bases" / "b.safetensors", say=silent)
    with pytest.raises(InputError, match=r"cannot be written: No such file or directory"):
        write_basis(checkpoints, tmp_path / "no" / "b", say=silent)
    with pytest.raises(InputError, match="is a URL"):
        write_basis("s3://somewhere/ck", tmp_path / "c", say=silent)


def test_more_segments_than_memory_holds_are_refused(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis_module, "free_memory", lambda: 1000.0)
    with pytest.raises(ResourceError, match=r"1\.94 kB, and 1 kB .* --steps ::K"):
        write_basis(checkpoints, tmp_path / "b", say=silent)


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(
    checkpoints: Path, tmp_path: Path
) -> None:
    (tmp_path / f".b.{os.getpid()}.tmp").write_text("half")
    write_basis(checkpoints, tmp_path / "b", say=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "ck"]


def test_a_disk_without_room_is_an_error_of_the_environment_and_nothing_is_left(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(directions_writer.DirectionsWriter, "write", full)
        with pytest.raises(ResourceError, match="no space left"):
            write_basis(checkpoints, tmp_path / "b", say=silent)
    usage = shutil.disk_usage(tmp_path)._replace(free=2399)
    monkeypatch.setattr(directions_writer.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ResourceError, match=r"takes 2\.4 kB, and 2\.4 kB are free"):
        write_basis(checkpoints, tmp_path / "b", say=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]
