"""Files of directions that anybody may have written, and directions made orthonormal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
import torch
from safetensors.torch import save_file

from lca_posthoc.checkpoints.directions_file import (
    MAX_DIRECTIONS,
    DirectionsAbout,
    open_directions,
    orthonormal,
)
from lca_posthoc.errors import InputError

Tensors = dict[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {"fc.weight": (3, 4), "fc.bias": (3,), "scale": ()}


def directions(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn((count, *shape), generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def write(place: Path, tensors: Tensors, **about: object) -> Path:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, place / "b", metadata={"directions": json.dumps(about)} if about else None)
    return place / "b"


def test_a_file_is_opened_checked_and_read(tmp_path: Path) -> None:
    about = {
        "kind": "mine",
        "seed": 3,
        "labels": ["\x1b[31m", "b"],
        "singular_values": [2, 0.5],
        "more": {},
    }
    path = write(tmp_path, directions(), **about)
    opened = open_directions(path, SHAPES)
    assert opened.directions == 2
    assert opened.digest == google_crc32c.value(path.read_bytes())
    assert opened.about == DirectionsAbout(
        kind="mine", seed=3, labels=("\x1b[31m", "b"), singular_values=(2.0, 0.5)
    )
    found = opened.read()
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in directions().items())


def test_names_are_those_of_the_model_without_wrappers_and_aliases(tmp_path: Path) -> None:
    tensors = {
        "module.fc.weight": directions()["fc.weight"],
        "head": directions()["fc.bias"],
    }
    shapes = {f"_orig_mod.{name}": shape for name, shape in SHAPES.items()}
    opened = open_directions(write(tmp_path, tensors), shapes, {"head": "_orig_mod.fc.bias"})
    found = opened.read()
    assert found.keys() == {"_orig_mod.fc.weight", "_orig_mod.fc.bias"}
    assert torch.equal(found["_orig_mod.fc.bias"], tensors["head"])


def test_a_file_without_metadata_or_of_bfloat16_will_do(tmp_path: Path) -> None:
    opened = open_directions(write(tmp_path, directions(dtype=torch.bfloat16)), SHAPES)
    assert opened.about == DirectionsAbout()
    assert opened.read()["scale"].dtype == torch.bfloat16


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    opened = open_directions(write(tmp_path, directions()), SHAPES)
    write(tmp_path, {name: 2 * tensor for name, tensor in directions().items()})
    with pytest.raises(InputError, match="changed since it was opened"):
        opened.read()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t | {"\x1b[2J": t["scale"]}, repr("\x1b[2J") + ", which the model"),
        (lambda t: t | {"module.scale": t["scale"]}, "are both tensor 'scale'"),
        (lambda t: t | {"scale": torch.zeros(3)}, "has shape ["),
        (lambda t: t | {"fc.weight": torch.zeros(2, 4, 3)}, "[2, 4, 3], and [2, 3, 4] is needed"),
        (lambda t: t | {"fc.bias": torch.zeros(2, 3, dtype=torch.int32)}, "of type I32"),
        (lambda t: t | {"fc.bias": torch.full((2, 3), torch.inf)}, "'fc.bias' in "),
        (lambda t: t | {"scale": torch.tensor([0.0, torch.nan])}, "holds NaN or Inf"),
        (lambda t: {"scale": torch.tensor(0.0)}, "k at least 1"),
        (lambda t: {"scale": torch.zeros(0)}, "k at least 1"),
        (lambda t: {"scale": torch.zeros(MAX_DIRECTIONS + 1)}, "at most 1,024"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_tensors_that_are_no_directions_of_the_model_are_refused(
    tmp_path: Path, spoil: Callable[[Tensors], Tensors], words: str
) -> None:
    path = write(tmp_path, spoil(directions()))
    with pytest.raises(InputError) as refused:
        open_directions(path, SHAPES)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 10**5, "not a JSON object"),
        (json.dumps({"kind": "x" * 2**20}), "not a JSON object"),
        (json.dumps({"kind": 3}), "not a short string"),
        (json.dumps({"seed": True}), "not a whole number"),
        (json.dumps({"seed": -1}), "not a whole number"),
        (json.dumps({"labels": ["a"]}), "one label for each of 2"),
        (json.dumps({"labels": ["a", "b" * 1001]}), "one label for each of 2"),
        (json.dumps({"labels": "ab"}), "one label for each of 2"),
        (json.dumps({"singular_values": [1, -1]}), "one singular value for each of 2"),
        ('{"singular_values": [1, NaN]}', "one singular value for each of 2"),
        ('{"singular_values": [1, Infinity]}', "one singular value for each of 2"),
        (f'{{"singular_values": [1, 1{"0" * 400}]}}', "one singular value for each of 2"),
        (json.dumps({"singular_values": [1, True]}), "one singular value for each of 2"),
    ],
)
def test_metadata_that_does_not_hold_together_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    save_file(directions(), tmp_path / "b", metadata={"directions": text})
    with pytest.raises(InputError, match=words):
        open_directions(tmp_path / "b", SHAPES)


def test_files_that_are_cut_or_missing_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, directions())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        open_directions(path, SHAPES)
    with pytest.raises(InputError, match="cannot read"):
        open_directions(tmp_path / "no", SHAPES)
    with pytest.raises(InputError, match="is a URL"):
        open_directions("s3://somewhere/b", SHAPES)


# --- orthonormal directions -----------------------------------------------------------------------


def flat(tensors: Tensors) -> torch.Tensor:
    count = len(next(iter(tensors.values())))
    return torch.cat([tensor.double().reshape(count, -1) for tensor in tensors.values()], dim=1)


@pytest.mark.parametrize(
    ("dtype", "result", "error"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
    ],
)
def test_directions_become_what_qr_makes_of_them(
    dtype: torch.dtype, result: torch.dtype, error: float
) -> None:
    tensors = {**directions(6, dtype), "none": torch.zeros(6, 0, 3, dtype=dtype)}
    found = orthonormal(dict(tensors))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert {tensor.dtype for tensor in found.values()} == {result}
    q, r = torch.linalg.qr(flat(tensors).T)
    expected = (q * r.diagonal().sign()).T
    torch.testing.assert_close(flat(found), expected, rtol=0, atol=error)


def test_nearly_parallel_directions_are_orthonormal_after_the_second_time() -> None:
    tensors = directions(4, torch.float64)
    first = {name: tensor[:1] for name, tensor in tensors.items()}
    close = {name: first[name] + 1e-4 * tensor for name, tensor in tensors.items()}
    found = flat(orthonormal({name: 1e6 * tensor for name, tensor in close.items()}))
    torch.testing.assert_close(
        found @ found.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("combine", "words"),
    [
        (lambda a, b: torch.stack([a, b, 2 * a - b / 3]), "direction 2 .* is a combination"),
        (lambda a, b: torch.stack([a, -3 * a, b]), "direction 1 .* is a combination"),
        (lambda a, b: torch.stack([a, 0 * a, b]), "direction 1 .* is 0"),
    ],
)
def test_directions_that_depend_on_each_other_are_named(
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], words: str
) -> None:
    tensors = {name: combine(tensor[0], tensor[1]) for name, tensor in directions().items()}
    with pytest.raises(InputError, match=words):
        orthonormal(dict(tensors))
