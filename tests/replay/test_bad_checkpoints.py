"""Checkpoints that cannot be replayed are refused by name; one damaged file fails its own spans only."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lca_posthoc.checkpoints.headers import read_header
from tests.helpers.cli import (
    STEPS,
    contents,
    document,
    iterates,
    last_line,
    lca,
    marker,
    refused,
    says,
    step_file,
    write_step,
)

from ..helpers.wrong_input import MIDDLE, Place, before_span, completes_as, spans_of


def test_what_is_right_is_not_refused(place: Place) -> None:
    result = place.run()
    assert (result.exit_code, result.stderr) == (0, "")


# --- the directory of checkpoints -----------------------------------------------------------------


def _edit(directory: Path, step: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = dict(iterates()[STEPS.index(step)])
    change(tensors)
    write_step(directory, step, tensors)


def _edit_all(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    for step in STEPS:
        _edit(directory, step, change)


def _keep_only(directory: Path, *steps: int) -> None:
    for path in directory.iterdir():
        if path not in [step_file(directory, step) for step in steps]:
            path.unlink()


def _become_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("no directory")


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def _with(
    name: str, *shape: int, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


DIRECTORIES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "empty": (
        _keep_only,
        ("holds no checkpoint", "at least two are needed", "step_00000010.safetensors"),
    ),
    "one checkpoint": (
        lambda ck: _keep_only(ck, 20),
        ("only one checkpoint (step 20)", "at least two are needed"),
    ),
    "missing": (shutil.rmtree, ("is not a directory of checkpoints", "Give the directory")),
    "a file": (_become_file, ("is not a directory of checkpoints", "Give the directory")),
    "two files claim one step": (
        lambda ck: write_step(ck, 20, iterates()[2], name="again.safetensors"),
        ("step_00000020.safetensors", "again.safetensors", "both claim step 20", "Remove one"),
    ),
    "a copy under the name of another step": (
        lambda ck: (ck / "step_00000015.safetensors").write_bytes(
            save(dict(iterates()[2]), {"step": "20"})
        ),
        ("step_00000015.safetensors says step 15 in its name and 20 in its metadata", "--pattern"),
    ),
    "no step to be told": (
        lambda ck: [
            path.write_bytes(save(dict(iterates()[0])))
            for path in (ck / "final.safetensors", ck / "best.safetensors")
        ],
        ("cannot tell the training step", "final.safetensors", "best.safetensors", "--pattern"),
    ),
    "tensor missing": (
        lambda ck: _edit_all(ck, _without("out.bias")),
        ("'out.bias'", "shape [4]", "missing", "step_00000000.safetensors", "step 0", "--rename"),
    ),
    "tensor under another name": (
        lambda ck: _edit_all(ck, lambda tensors: tensors.update(head=tensors.pop("out.bias"))),
        ("'out.bias'", "missing", "'head' instead", "--rename"),
    ),
    "tensor extra": (
        lambda ck: _edit_all(ck, _with("head", 3)),
        (
            "'head'",
            "not in the task's model",
            "step 0",
            "Build the model that was trained",
            "--rename",
        ),
    ),
    "tensor of another shape": (
        lambda ck: _edit_all(ck, _with("out.bias", 5)),
        (
            "'out.bias'",
            "[5]",
            "[4] in the task's model",
            "step 0",
            "Build the model that was trained",
        ),
    ),
    "tensor missing at a middle step": (
        lambda ck: _edit(ck, MIDDLE, _without("out.bias")),
        (
            "'out.bias'",
            "absent",
            "step_00000030.safetensors",
            "step 30",
            "F32 [4] at the first step",
        ),
    ),
    "tensor extra at a middle step": (
        lambda ck: _edit(ck, MIDDLE, _with("head", 3)),
        ("'head'", "F32 [3]", "step 30", "absent at the first step"),
    ),
    "tensor of another shape at a middle step": (
        lambda ck: _edit(ck, MIDDLE, _with("out.bias", 5)),
        ("'out.bias'", "F32 [5]", "step 30", "F32 [4] at the first step"),
    ),
    "tensor of another dtype at the last step": (
        lambda ck: _edit(ck, STEPS[-1], _with("out.bias", 4, dtype=torch.float64)),
        ("'out.bias'", "F64 [4]", "step 60", "F32 [4] at the first step"),
    ),
    "a shard is missing": (
        lambda ck: _sharded(ck / "checkpoint-70", written=("model-00001-of-00002.safetensors",)),
        ("checkpoint-70", "model-00002-of-00002.safetensors", "missing", "remove its directory"),
    ),
    "a shard index that names no files": (
        lambda ck: _sharded(ck / "checkpoint-70", index='{"weight_map": {"out.bias": 7}}'),
        ("checkpoint-70", "not a shard index", "weight_map"),
    ),
    "a step too large in a name": (
        lambda ck: (ck / f"step_{'9' * 30}.safetensors").write_bytes(save(dict(iterates()[0]))),
        ("9" * 30, "step"),
    ),
    "a shard index is not one": (
        lambda ck: _sharded(ck / "checkpoint-70", index="[]"),
        ("checkpoint-70", "not a shard index", "weight_map"),
    ),
}


def _sharded(directory: Path, *, index: str | None = None, written: tuple[str, ...] = ()) -> None:
    directory.mkdir()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    table = {"weight_map": dict(zip(("hidden.weight", "out.weight"), names, strict=True))}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(table) if index is None else index
    )
    for name in written:
        write_step(directory, 70, iterates()[0], name=name)


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_that_cannot_be_replayed_is_refused(place: Place, case: str) -> None:
    spoil, words = DIRECTORIES[case]
    spoil(place.checkpoints)
    place.refuses(*words)


def test_a_checkpoint_directory_whose_files_cannot_be_told_apart_is_not_passed_over_in_silence(
    place: Place,
) -> None:
    directory = place.checkpoints / "checkpoint-70"
    for part in (1, 2):  # shards without their index
        write_step(directory, 70, iterates()[0], name=f"model-0000{part}-of-00002.safetensors")
    assert "checkpoint-70" in place.run().stderr


# --- damaged files --------------------------------------------------------------------------------


def _pickled(data: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"out.bias": torch.zeros(4)}, file)
    return file.getvalue()


def _oversized(data: bytes) -> bytes:
    return (33 * 2**20).to_bytes(8, "little") + b"{}" + bytes(33 * 2**20)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "its 0 bytes do not begin with a safetensors header"),
    "cut in the length": (
        lambda data: data[:5],
        "its 5 bytes do not begin with a safetensors header",
    ),
    "cut in the header": (
        lambda data: data[:50],
        "its 50 bytes do not begin with a safetensors header",
    ),
    "cut in the body": (lambda data: data[:-400], "400 too few"),
    "minus one byte": (lambda data: data[:-1], "1 too few"),
    "plus one byte": (lambda data: data + b"\0", "1 too many"),
    "garbage": (
        lambda data: bytes(range(255, 0, -1)) * 4,
        "do not begin with a safetensors header",
    ),
    "zeros": (lambda data: bytes(len(data)), "do not begin with a safetensors header"),
    "header not JSON": (lambda data: data[:8] + b"[" + data[9:], "not valid JSON"),
    "header not UTF-8": (lambda data: data[:10] + b"\xff" + data[11:], "not valid JSON"),
    "header too long": (_oversized, "its header claims 34,603,008 bytes"),
    "an entry that lies": (
        lambda data: data.replace(b'"shape":[8]', b'"shape":[9]'),
        "'hidden.bias' does not hold together",
    ),
}


@pytest.mark.parametrize("step", [STEPS[0], MIDDLE, STEPS[-1]])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name_before_anything_is_created(
    place: Place, damage: str, step: int
) -> None:
    spoil, what = DAMAGE[damage]
    path = step_file(place.checkpoints, step)
    before = path.read_bytes()
    path.write_bytes(spoil(before))
    assert path.read_bytes() != before
    place.refuses(str(path), "is not a whole safetensors file", what, "Save it again")


FOREIGN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "GGUF": (b"GGUF\x03" + bytes(200), ("but GGUF, a format for inference",)),
    "torch.save": (_pickled(b""), ("a zip archive, as torch.save writes it", "lca import")),
    "older torch.save": (
        pickle.dumps({"out.bias": [0.0]}, 2),
        ("a pickle, as older torch.save", "lca import"),
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(200), ("but HDF5", "lca import FILE")),
    "gzip": (gzip.compress(bytes(2000), mtime=0), ("compressed", "decompress it")),
    "gzip, whose first bytes are a length": (
        gzip.compress(bytes(2000), mtime=0) + bytes(2**20),
        ("decompress it",),
    ),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), ("decompress it",)),
    "numpy": (b"\x93NUMPY" + bytes(100), ("one array of numpy",)),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        ("Git LFS", "git lfs pull"),
    ),
    "an error page": (
        b"\n<!DOCTYPE html>\n<html><body>403</body></html>",
        ("HTML", "download the file again"),
    ),
    "an error in XML": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        ("HTML or XML",),
    ),
    "an error in JSON": (
        b'{"error": "Repository not found"}',
        ("text in JSON", "download the file again"),
    ),
}


@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_format_is_called_what_it_is(
    place: Place, content: bytes, words: tuple[str, ...]
) -> None:
    path = step_file(place.checkpoints, MIDDLE)
    path.write_bytes(content)
    place.refuses(f"{path} is not a safetensors file, as its name says, but", *words)


def test_the_length_of_a_header_may_look_like_another_format(tmp_path: Path) -> None:
    """A header of 0x8b1f bytes begins with the two bytes of gzip."""
    tensors = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "step_1.safetensors"
    path.write_bytes(0x8B1F.to_bytes(8, "little") + tensors.ljust(0x8B1F) + bytes(4))
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert list(read_header(path).tensors) == ["a"]


@pytest.mark.parametrize("metadata", [[1], "text", 7, {"step": 3}, {"step": None}], ids=str)
def test_metadata_of_a_wrong_kind_is_refused(place: Place, metadata: Any) -> None:
    _rewrite_metadata(step_file(place.checkpoints, MIDDLE), metadata)
    place.refuses("step_00000030.safetensors", "is not a whole safetensors file")


@pytest.mark.parametrize(
    "step", ["²", "9" * 5000, "9" * 30], ids=["superscript", "5000 digits", "30 digits"]
)
def test_a_step_in_metadata_that_is_no_usable_number_is_refused(place: Place, step: str) -> None:
    _rewrite_metadata(step_file(place.checkpoints, MIDDLE), {"step": step})
    place.refuses("step_00000030.safetensors", "step")


def _rewrite_metadata(path: Path, metadata: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8 : 8 + length]), "__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_a_name_that_steers_a_terminal_is_shown_harmless_and_on_one_line(place: Place) -> None:
    (place.checkpoints / "best\n\x07\x9b31m.safetensors").write_bytes(save(dict(iterates()[0])))
    place.refuses("cannot tell the training step", "best")


def test_a_pipe_that_looks_like_a_checkpoint_is_not_waited_for(place: Place) -> None:
    os.mkfifo(step_file(place.checkpoints, 70))
    code = (
        "from lca_posthoc.checkpoints.trajectory import "
        f"open_trajectory\nopen_trajectory({str(place.checkpoints)!r})"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=10)


# --- numbers that are not finite, files that change under way -------------------------------------


def _poison(place: Place, step: int, value: float = float("nan")) -> bytes:
    """Put one NaN into a checkpoint; returns the file's bytes from before."""
    before = step_file(place.checkpoints, step).read_bytes()
    tensors = {name: tensor.clone() for name, tensor in iterates()[STEPS.index(step)].items()}
    tensors["out.weight"][1, 2] = value
    write_step(place.checkpoints, step, tensors)
    return before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_fails_its_span_and_no_other(
    place: Place, value: float
) -> None:
    _poison(place, MIDDLE, value)
    line = refused(
        place.run(),
        "1 span failed",
        "the others are complete",
        "Steps 20 to 40",
        "'out.weight'",
        code=3,
    )
    says(
        line,
        "1 NaN or Inf",
        "step_00000030.safetensors",
        "(step 30)",
        "Running again cannot replay their spans",
    )
    assert spans_of(place) == (2, 3, False)
    status = lca("status", place.out).stdout
    says(
        status,
        "2 / 3",
        "4 / 6",
        "done except for NaN or Inf at step 30",
        "the last driver ended with SpanError",
    )
    assert "again to finish" not in status
    assert document(lca("status", place.out, "--json"))["losses"]["train"]["not_finite"] == [30]
    summary = lca("summary", place.out, "--json")
    assert document(summary)["losses"]["train"]["segments"] == 4
    says(summary.stderr, "note: ", "not complete")


def test_every_checkpoint_that_is_not_finite_is_named(place: Place) -> None:
    _poison(place, STEPS[1])
    _poison(place, STEPS[-1], float("inf"))
    line = refused(
        place.run(), "2 spans failed", "the checkpoints of steps 10, 60 hold NaN or Inf", code=3
    )
    says(line, "Running again cannot replay")
    says(lca("status", place.out).stdout, "done except for NaN or Inf at steps 10, 60")


def test_a_span_that_misses_for_another_reason_is_still_to_be_run(place: Place) -> None:
    _poison(place, MIDDLE)
    assert place.run().exit_code == 3
    marker(place.out, "train", 0).unlink()
    says(lca("status", place.out).stdout, "run `lca run` again to finish")


def test_a_number_that_is_not_finite_fails_again_and_what_is_complete_is_not_replayed(
    place: Place,
) -> None:
    _poison(place, MIDDLE)
    first = last_line(place.run())
    before = contents(place.out)
    assert last_line(place.run()) == first
    after = contents(place.out)
    assert after.pop("log/run.jsonl") != before.pop("log/run.jsonl")
    assert after == before


@pytest.mark.parametrize("step", [MIDDLE, STEPS[-1]])
def test_a_repaired_checkpoint_completes_the_run_as_if_it_had_never_been_damaged(
    place: Place, clean_run: Path, step: int
) -> None:
    """No committed number relies on the damaged file, so the repaired one is taken up."""
    before = _poison(place, step)
    assert place.run().exit_code == 3
    step_file(place.checkpoints, step).write_bytes(before)
    completes_as(place, clean_run)


def test_a_checkpoint_numbers_rely_on_cannot_be_replaced_while_another_span_is_damaged(
    place: Place,
) -> None:
    _poison(place, MIDDLE)
    assert place.run().exit_code == 3
    write_step(place.checkpoints, STEPS[1], iterates()[0])
    place.refuses("other checkpoints", "the content of step 10 differs", "--out")


def test_not_finite_at_the_first_step_is_refused_before_anything_is_created(place: Place) -> None:
    _poison(place, STEPS[0])
    place.refuses("'out.weight'", "1 NaN or Inf", "step_00000000.safetensors", "(step 0)")


def test_not_finite_at_the_last_step_fails_the_last_span(place: Place) -> None:
    _poison(place, STEPS[-1])
    refused(place.run(), "1 span failed", "Steps 40 to 60", "'out.weight'", "(step 60)", code=3)
    assert spans_of(place) == (2, 3, False)


def test_the_way_out_of_a_number_that_is_not_finite_is_a_way_out(place: Place) -> None:
    """A step in the middle cannot be left out by `--steps A:B[:K]` alone, so the message must offer
    something else.
    """
    _poison(place, MIDDLE)
    line = last_line(place.run())
    assert "leave it out with --steps" not in line
    says(line, "--out")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, 400), "Restore the file and run again"),
    "emptied": (lambda path: os.truncate(path, 0), "Restore the file and run again"),
    "deleted": (lambda path: path.unlink(), "Restore the file and run again"),
    "replaced": (
        lambda path: write_step(path.parent, MIDDLE, iterates()[0]),
        "changed since the run was created. Restore it",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_way_fails_its_span_and_restored_it_completes(
    place: Place, clean_run: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    spoil, words = CHANGES[change]
    path = step_file(place.checkpoints, MIDDLE)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        before_span(patch, 0, lambda: spoil(path))
        refused(
            place.run(), "1 span failed", "Steps 20 to 40", str(path), "(step 30)", words, code=3
        )
    assert spans_of(place) == (2, 3, False)
    path.write_bytes(before)
    assert place.run().exit_code == 0
    assert contents(place.out / "data.zarr") == contents(clean_run / "run.lca" / "data.zarr")


# --- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_warns_with_the_measured_share_of_what_does_not_move(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    place = Place(tmp_path)
    stored = [
        {name: tensor.to(dtype) for name, tensor in tensors.items()}
        for tensors in _barely_moving(dtype)
    ]
    for step, tensors in zip(STEPS, stored, strict=True):
        write_step(place.checkpoints, step, tensors)
    pairs = [(stored[at][name], stored[at + 1][name]) for at in (0, 2, 5) for name in stored[0]]
    still = sum(int((before == after).sum()) for before, after in pairs)
    share = still / sum(before.numel() for before, _ in pairs)
    assert 0.1 < share < 0.9, "the case must be able to tell right from wrong"
    result = place.run()
    assert result.exit_code == 0
    says(
        result.stderr,
        "note: ",
        "half precision (4 tensors)",
        f"{share:.1%}",
        "Record float32 weights",
    )


def _barely_moving(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Weights that move by a fraction of a unit in the last place of `dtype`."""
    start, generator, unit = iterates()[0], torch.Generator().manual_seed(3), torch.finfo(dtype).eps
    return [
        {
            name: tensor * (1 + 0.02 * step * unit * torch.rand(tensor.shape, generator=generator))
            for name, tensor in start.items()
        }
        for step in STEPS
    ]
