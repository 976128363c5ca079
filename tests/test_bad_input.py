"""Whatever is wrong with checkpoints, task, options or disk is said in one line, with its exit
code, and leaves nothing behind.

Every test goes through the command line; every refusal is compared with what lay on disk before,
byte for byte.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lca_posthoc import replay
from lca_posthoc.headers import read_header
from lca_posthoc.worker import state
from tests.helpers.cli import (
    STEPS,
    contents,
    document,
    iterates,
    last_line,
    lca,
    marker,
    record,
    refused,
    run_lca,
    says,
    step_file,
    write_step,
    write_task,
)

MIDDLE = 30


class Place:
    """A recorded directory, a task file, and a run directory that is not there yet."""

    def __init__(self, root: Path) -> None:
        self.data = root / "data"
        self.checkpoints, self.out, self.task = (
            self.data / "ck",
            self.data / "run.lca",
            root / "task.py",
        )
        self.data.mkdir()
        write_task(self.task)

    def run(self, *options: object) -> Any:
        return run_lca(self.checkpoints, self.task, self.out, *options)

    def refuses(self, *words: str, options: tuple[object, ...] = (), code: int = 2) -> str:
        """The command is refused with all of `words`, and everything on disk is as it was."""
        before = contents(self.data)
        line = refused(self.run(*options), *words, code=code)
        assert contents(self.data) == before
        return line


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and a finished run, to be copied: safetensors writes the same tensors in
    differing bytes.
    """
    made = Place(tmp_path_factory.mktemp("clean"))
    record(made.checkpoints)
    assert made.run().exit_code == 0
    return made.data


@pytest.fixture
def place(tmp_path: Path, clean_run: Path) -> Place:
    made = Place(tmp_path)
    shutil.copytree(clean_run / "ck", made.checkpoints)
    return made


@pytest.fixture
def finished(place: Place, clean_run: Path) -> Place:
    shutil.copytree(clean_run / "run.lca", place.out)
    return place


def test_what_is_right_is_not_refused(place: Place) -> None:
    result = place.run()
    assert (result.exit_code, result.stderr) == (0, "")


# --- the directory of checkpoints
# --------------------------------------------------------------------------------------


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


# --- damaged files
# -----------------------------------------------------------------------------------------------------


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
        ("text in JSON", "download it again"),
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
        f"from lca_posthoc.trajectory import "
        f"open_trajectory\nopen_trajectory({str(place.checkpoints)!r})"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=10)


# --- numbers that are not finite, files that change under way
# ------------------------------------------------------------


def _poison(place: Place, step: int, value: float = float("nan")) -> bytes:
    """Put one NaN into a checkpoint; returns the file's bytes from before."""
    before = step_file(place.checkpoints, step).read_bytes()
    tensors = {name: tensor.clone() for name, tensor in iterates()[STEPS.index(step)].items()}
    tensors["out.weight"][1, 2] = value
    write_step(place.checkpoints, step, tensors)
    return before


def _spans(place: Place) -> tuple[int, int, bool]:
    found = document(lca("status", place.out, "--json"))["losses"]["train"]
    return found["spans_done"], found["spans"], found["complete"]


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
    assert _spans(place) == (2, 3, False)
    status = lca("status", place.out).stdout
    says(
        status,
        "2 / 3",
        "4 / 6",
        "done but for NaN or Inf at step 30",
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
    says(lca("status", place.out).stdout, "done but for NaN or Inf at steps 10, 60")


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
    _completes_as(place, clean_run)


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
    assert _spans(place) == (2, 3, False)


def test_the_way_out_of_a_number_that_is_not_finite_is_a_way_out(place: Place) -> None:
    """A step in the middle cannot be left out by `--steps A:B[:K]` alone, so the message must offer
    something else.
    """
    _poison(place, MIDDLE)
    line = last_line(place.run())
    assert "leave it out with --steps" not in line
    says(line, "--out")


def _before_span(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[], object]) -> None:
    """Do something just before the replay of a span starts, counted from 0."""
    original, calls = replay.replay_span, iter(range(10**6))

    def hooked(spec: dict[str, Any]) -> dict[str, Any]:
        if next(calls) == call:
            act()
        return original(spec)

    monkeypatch.setattr(replay, "replay_span", hooked)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, 400), "Restore the file and run again"),
    "emptied": (lambda path: os.truncate(path, 0), "Restore the file and run again"),
    "deleted": (lambda path: path.unlink(), "Restore the file and run again"),
    "replaced": (
        lambda path: write_step(path.parent, MIDDLE, iterates()[0]),
        "is not the file it was when the run was created. Restore it",
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
        _before_span(patch, 0, lambda: spoil(path))
        refused(
            place.run(), "1 span failed", "Steps 20 to 40", str(path), "(step 30)", words, code=3
        )
    assert _spans(place) == (2, 3, False)
    path.write_bytes(before)
    assert place.run().exit_code == 0
    assert contents(place.out / "data.zarr") == contents(clean_run / "run.lca" / "data.zarr")


# --- half precision
# ----------------------------------------------------------------------------------------------------


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


# --- the task
# ----------------------------------------------------------------------------------------------------------

TRAIN_LOSS = '"train": Loss(F.cross_entropy, on="train")'
TRAIN_DATA = "train = (inputs[:30], targets[:30])"
RETURN = "    return Task("
DATASET = """
class Data:
    def __len__(self):
        return 30
    def __getitem__(self, index):
        {body}
train = Data()
"""

TASKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # the file
    "syntax error": (
        "def task():",
        "def task(:",
        ("cannot import task", "SyntaxError", "task.py", "line"),
    ),
    "import error": (
        "import torch\n",
        "import nosuch\n",
        ("cannot import task", "No module named 'nosuch'", "task.py:1"),
    ),
    "import of a name that is not there": (
        "from lca_posthoc import Loss",
        "from torch import nosuch, Loss",
        ("cannot import task", "ImportError", "nosuch", "task.py:3"),
    ),
    "raises when imported": (
        "generator =",
        "raise ValueError('no data today')\ngenerator =",
        ("cannot import task", "ValueError: no data today", "task.py:16"),
    ),
    "exits when imported": (
        "generator =",
        "raise SystemExit('set DATA')\ngenerator =",
        ("SystemExit", "set DATA", "task.py:16"),
    ),
    # the function
    "no task()": (
        "def task():",
        "def make():",
        ("task.py:task", "no such function", "def task() -> Task"),
    ),
    "task is no function": (
        "def task():",
        "task = 3\ndef make():",
        ("task.py:task", "def task() -> Task"),
    ),
    "returns a dict": (
        RETURN,
        "    return dict(",
        ("task.py:task() returned dict, not a Task", "return Task("),
    ),
    "returns nothing": (RETURN, "    Task(", ("returned NoneType, not a Task", "return Task(")),
    "raises": (
        RETURN,
        f"    raise KeyError('split')\n{RETURN}",
        ("task.py:task() raised KeyError: 'split'", "task.py:28"),
    ),
    "raises with a message of two lines": (
        RETURN,
        f"    raise OSError('one\\ntwo')\n{RETURN}",
        ("OSError", "one", "two"),
    ),
    "exits": (
        RETURN,
        f"    raise SystemExit(0)\n{RETURN}",
        ("task.py:task()", "SystemExit", "task.py:28"),
    ),
    "wants an argument": (
        "def task():",
        "def task(size):",
        ("task.py:task() raised TypeError", "'size'"),
    ),
    # the Task
    "a model made already": (
        "model=Net",
        "model=Net()",
        ("zero-argument factory", "got Net", "model=Net"),
    ),
    "a model that is a name": ("model=Net", "model='Net'", ("zero-argument factory", "got str")),
    "a model that raises": (
        "model=Net",
        "model=lambda: 1 / 0",
        ("Task.model() raised ZeroDivisionError",),
    ),
    "a model that is no module": (
        "model=Net",
        "model=lambda: 7",
        ("Task.model() returned int, not an nn.Module",),
    ),
    "no data": (
        'data={"train": train, "validation": validation}',
        "data={}",
        ("Task.data must name at least one split",),
    ),
    "no losses": (
        RETURN,
        "    return Task(Net, {'train': train}, {})\n    dict(",
        ("Task.losses must name at least one loss",),
    ),
    "an unknown split": (
        'on="validation")',
        'on="test")',
        ("loss 'validation'", "'test'", "'train', 'validation'"),
    ),
    "a loss that is no Loss": (
        TRAIN_LOSS,
        '"train": F.cross_entropy',
        ("losses['train'] must be a Loss", "Loss(fn, on='train')"),
    ),
    "a Loss of nothing": (
        TRAIN_LOSS,
        '"train": Loss(on="train")',
        ("Loss takes one of: a function", "Loss(call=fn"),
    ),
    "a Loss of a word": (
        TRAIN_LOSS,
        '"train": Loss("mse")',
        ("needs something to call", "got str 'mse'", "Loss(F.cross_entropy)"),
    ),
    # the data
    "an empty split": (
        TRAIN_DATA,
        "train = (inputs[:0], targets[:0])",
        ("split 'train' is empty", "at least one example"),
    ),
    "inputs and targets of different lengths": (
        TRAIN_DATA,
        "train = (inputs[:30], targets[:29])",
        ("split 'train'", "[29, 30]", "one target per input"),
    ),
    "a split of no tensors": (TRAIN_DATA, "train = ()", ("split 'train'", "(inputs, targets)")),
    "data that is a number": (
        TRAIN_DATA,
        "train = 7",
        ("split 'train' is a int", "(inputs, targets)", "map-style Dataset"),
    ),
    "data that can be read once": (
        TRAIN_DATA,
        "train = iter([1, 2])",
        ("split 'train' is a list_iterator", "map-style Dataset"),
    ),
    "data that is a table": (
        TRAIN_DATA,
        "train = {'x': inputs, 'y': targets}",
        ("a batch is a dict of 2, not (inputs, targets)", "Loss(call=fn)"),
    ),
    "data that raises": (
        TRAIN_DATA,
        DATASET.format(body="raise ValueError('image 0 is damaged')"),
        ("split 'train'", "ValueError: image 0 is damaged"),
    ),
    "examples that cannot be collated": (
        TRAIN_DATA,
        DATASET.format(body="return None, 1"),
        ("split 'train'", "NoneType"),
    ),
    "three tensors for a plain function": (
        TRAIN_DATA,
        "train = (inputs, targets, targets)",
        ("tuple of 3, not (inputs, targets)", "Loss(call=fn)"),
    ),
    "inputs the model cannot take": (
        TRAIN_DATA,
        "train = (inputs[:30, :9], targets[:30])",
        ("failed on split 'train'", "RuntimeError", "shapes cannot be multiplied"),
    ),
    "targets out of range": (
        TRAIN_DATA,
        "train = (inputs[:30], targets[:30] + 9)",
        ("failed on split 'train'", "IndexError"),
    ),
    # the loss
    "a scalar": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: F.cross_entropy(outputs, targets))',
        ("returned a scalar", "one value per element", "reduction='none'"),
    ),
    "a scalar from a call": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: cross_entropy(model, batch).mean())',
        ("returned a scalar", "(values, weights)"),
    ),
    "a number": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: 3.0)',
        ("returned a float, not a tensor",),
    ),
    "whole numbers": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: targets)',
        ("not a tensor of floating-point values",),
    ),
    "values and weights of different shape": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch), torch.ones(3)))',
        ("weights [3]", "they must agree"),
    ),
    "weights that are a number": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch), 1.0))',
        ("weights float", "they must agree"),
    ),
    "weights of nothing": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch), '
        "torch.zeros(len(batch[1]))))",
        ("weights", "sum to 0 ", "Give elements a weight"),
    ),
    "a loss that is random": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: cross_entropy(model, batch) * '
        "torch.rand(len(batch[1])))",
        ("loss 'train' is not deterministic", "augmentation"),
    ),
    "dropout that stays on": (
        "torch.tanh(self.hidden(inputs))",
        "F.dropout(torch.tanh(self.hidden(inputs)))",
        ("loss 'train' is not deterministic", "dropout called with training=True"),
    ),
    "a mean taken inside": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: cross_entropy(model, batch).mean().expand(3))',
        ("loss 'train' depends on how split 'train' is cut into batches", "a mean taken inside"),
    ),
    "a mean with weights of its own": (
        TRAIN_LOSS,
        '"train": Loss(lambda x, y, reduction="mean": F.cross_entropy(x, y, ignore_index=0, '
        "reduction=reduction))",
        ("loss 'train'", "reduction='mean'", "ignore_index", "(values, weights)"),
    ),
    "outputs and targets that are broadcast": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: (outputs[:, :1] - targets) ** 2)',
        ("loss 'train'", "they were broadcast against each other", "Make their shapes agree"),
    ),
    "a loss that is not finite": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch) - 99).log())',
        ("loss 'train' is nan at the first checkpoint", "--steps"),
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_a_task_that_cannot_be_evaluated_is_refused(place: Place, case: str) -> None:
    old, new, words = TASKS[case]
    write_task(place.task, old, new)
    place.refuses(*words)


PLACES = {
    "no such file": (
        "nosuch.py",
        ("task file nosuch.py does not exist", "--task FILE, FILE:FUNCTION or pkg.module:FUNCTION"),
    ),
    "no such function": (
        "{task}:other",
        ("task.py:other", "no such function", "def task() -> Task"),
    ),
    "no such module": (
        "nosuch.module:task",
        ("cannot import task nosuch.module", "No module named 'nosuch'"),
    ),
    "a directory": ("{task.parent}", ("task file", "does not exist")),
    "nothing": ("", ("task",)),
    "a module that is not a name": ("no such task", ("cannot import task no such task",)),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_task_that_is_not_there_is_refused(place: Place, case: str) -> None:
    text, words = PLACES[case]
    before = contents(place.data)
    result = run_lca(place.checkpoints, text.format(task=place.task), place.out)
    refused(result, *words)
    assert contents(place.data) == before


def test_task_files_of_the_same_text_in_different_folders_read_their_own_neighbours(
    place: Place,
) -> None:
    """The second model has another shape than the checkpoints: refused, not replayed with the first
    folder's model.
    """
    text = place.task.read_text().replace(
        "import torch\n", "from pathlib import Path\nimport torch\n", 1
    )
    text = text.replace("(64, 8)", "(64, WIDTH)").replace("(8, 4)", "(WIDTH, 4)")
    for name, width in (("one", 8), ("two", 9)):
        folder = place.data.parent / name
        folder.mkdir()
        (folder / "width.txt").write_text(str(width))
        read = "WIDTH = int(Path(__file__).with_name('width.txt').read_text())"
        (folder / "task.py").write_text(text.replace("class Net", f"{read}\n\n\nclass Net"))
    assert (
        run_lca(
            place.checkpoints, place.data.parent / "one" / "task.py", place.data / "one.lca"
        ).exit_code
        == 0
    )
    place.task = place.data.parent / "two" / "task.py"
    place.refuses("'hidden.weight'", "[9, 64]")


# --- options
# -----------------------------------------------------------------------------------------------------------

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown loss": (
        ("--loss", "nope"),
        ("no loss 'nope'", "'train', 'validation'", "--loss NAME or --loss all"),
    ),
    "tolerance 0": (
        ("--tolerance", "0"),
        ("--tolerance must be a positive number in units of loss", "got 0"),
    ),
    "negative tolerance": (
        ("--tolerance", "-1"),
        ("--tolerance must be a positive number in units of loss", "got -1"),
    ),
    "tolerance nan": (
        ("--tolerance", "nan"),
        ("--tolerance must be a positive number in units of loss", "got nan"),
    ),
    "allocation tolerance 0": (
        ("--allocation-tolerance", "0"),
        ("--allocation-tolerance must be a positive number in units of loss",),
    ),
    "batch size 0": (("--batch-size", "0"), ("--batch-size must be 1 or more, got 0",)),
    "negative batch size": (("--batch-size", "-3"), ("--batch-size must be 1 or more, got -3",)),
    "batch statistics of no batch": (
        ("--norm-stats", "batch"),
        ("--norm-stats batch needs --batch-size N",),
    ),
    "workers 0": (("--workers", "0"), ("--workers must be 1 or more, got 0",)),
    "negative workers": (("--workers", "-1"), ("--workers must be 1 or more, got -1",)),
    "unknown cluster": (
        ("--cluster", "nonsense"),
        ("--cluster 'nonsense' is not known", "local, inline, tcp://"),
    ),
    "steps that are a word": (("--steps", "many"), ("--steps 'many' is not A:B or A:B:K", "0:500")),
    "steps that are one number": (("--steps", "30"), ("--steps '30' is not A:B or A:B:K",)),
    "steps with a minus": (("--steps", "-10:30"), ("--steps '-10:30' is not A:B or A:B:K",)),
    "steps with four parts": (("--steps", "0:30:2:1"), ("--steps '0:30:2:1' is not A:B or A:B:K",)),
    "every 0-th step": (("--steps", "0:30:0"), ("--steps '0:30:0' is not A:B or A:B:K",)),
    "steps of nothing": (("--steps", ""), ("--steps '' is not A:B or A:B:K",)),
    "steps backwards": (("--steps", "40:10"), ("no checkpoint among steps 40:10", "at least two")),
    "steps that leave one": (
        ("--steps", "55:"),
        ("only one checkpoint (step 60) among steps 55:", "at least two"),
    ),
    "pattern that is no pattern": (
        ("--pattern", "(?P<step>"),
        ("--pattern", "(?P<step>", "regular expression"),
    ),
    "pattern without a step": (("--pattern", r"(\d+)"), ("--pattern", "(?P<step>")),
    "pattern that finds nothing": (
        ("--pattern", r"run_(?P<step>\d+)"),
        ("no checkpoint", "--pattern"),
    ),
    "rename without =": (("--rename", "out"), ("--rename 'out' is not OLD=NEW",)),
    "rename of nothing": (("--rename", "=out"), ("--rename '=out' is not OLD=NEW",)),
    "rename that is no pattern": (
        ("--rename", "(out=x"),
        ("--rename '(out=x'", "regular expression"),
    ),
    "rename to a group that is not there": (("--rename", r"out=\2"), (r"--rename 'out=\\2'",)),
    "rename that joins two": (
        ("--rename", ".*bias=bias"),
        ("'hidden.bias'", "'out.bias'", "both become 'bias'", "--rename"),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_makes_no_sense_is_refused_by_name(place: Place, case: str) -> None:
    options, words = OPTIONS[case]
    place.refuses(*words, options=options)


@pytest.mark.parametrize("case", [case for case in OPTIONS if "cluster" not in case])
def test_a_plan_refuses_the_options_a_run_refuses(place: Place, case: str) -> None:
    options, words = OPTIONS[case]
    refused(lca("plan", place.checkpoints, "--task", place.task, *options), *words)


@NO_GPU
@pytest.mark.parametrize("cluster", ["inline", "local"])
def test_a_gpu_that_is_not_there_is_a_failure_of_the_environment(
    place: Place, cluster: str
) -> None:
    options = ("--device", "cuda", "--cluster", cluster)
    place.refuses(
        "no GPU is visible", "--device cpu", "CUDA_VISIBLE_DEVICES", options=options, code=5
    )


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown rule": (("--rule", "euler"), ("--rule", "'euler'", "'simpson'", "'gauss-3'")),
    "unknown keep": (("--keep", "everything"), ("--keep", "'everything'", "'parameters'")),
    "unknown precision": (("--precision", "float8"), ("--precision", "'float8'", "'float32'")),
    "tolerance that is a word": (("--tolerance", "low"), ("--tolerance", "got low")),
    "batch size that is a word": (("--batch-size", "big"), ("--batch-size", "'big'")),
    "unknown option": (("--tolerence", "1"), ("--tolerence", "--tolerance")),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_refused_by_name(place: Place, case: str) -> None:
    options, words = USAGE[case]
    before = contents(place.data)
    result = place.run(*options)
    assert (result.exit_code, result.stdout) == (2, "")
    says(result.stderr, *words)
    assert contents(place.data) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", ".", "--task", "x.py", "--rule", "euler"),
        ("run", "."),
        ("run",),
        ("summary",),
        ("nosuch",),
        ("--nosuch",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_like_every_other_refusal(arguments: tuple[str, ...]) -> None:
    refused(lca(*arguments))


# --- where the result goes
# ---------------------------------------------------------------------------------------------

OUTPUTS: dict[str, Callable[[Path], object]] = {
    "a file": lambda out: out.write_text("mine"),
    "a directory with something in it": lambda out: (
        out.mkdir(),
        (out / "mine.txt").write_text("mine"),
    ),
    "an empty directory": lambda out: out.mkdir(),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_directory_that_is_something_else_is_refused(place: Place, case: str) -> None:
    OUTPUTS[case](place.out)
    place.refuses(str(place.out), "exists and is not a run directory", "--out")


def test_an_output_directory_below_a_file_is_refused(place: Place) -> None:
    (place.data / "mine.txt").write_text("mine")
    place.out = place.data / "mine.txt" / "run.lca"
    place.refuses("mine.txt", "--out")


def test_an_output_directory_that_is_a_broken_link_is_refused(place: Place) -> None:
    place.out.symlink_to(place.data / "nowhere")
    place.refuses(str(place.out), "--out")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_a_run_directory_whose_record_cannot_be_read_is_left_alone(
    finished: Place, text: str
) -> None:
    (finished.out / "run.json").write_text(text)
    finished.refuses(str(finished.out), code=1)


# --- resuming with something else than recorded
# ------------------------------------------------------------------------

SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rule": (("--rule", "left"), ("--rule simpson", "left")),
    "tolerance": (("--tolerance", "1e-4"), ("--tolerance 0.001", "0.0001")),
    "tolerance inf": (("--tolerance", "inf"), ("--tolerance 0.001", "inf")),
    "allocation tolerance": (("--allocation-tolerance", "1"), ("--allocation-tolerance inf", "1")),
    "keep": (("--keep", "tensors"), ("--keep parameters", "tensors")),
    "precision": (("--precision", "float64"), ("--precision float32", "float64")),
    "norm stats": (("--norm-stats", "batch"), ("--norm-stats running", "batch")),
    "batch size": (("--batch-size", "7"), ("--batch-size", "7")),
    "steps": (("--steps", "10:"), ("--steps", "10:")),
    "pattern": (("--pattern", r"step_(?P<step>\d+)"), ("--pattern",)),
    "rename": (("--rename", "a=b"), ("--rename", "a=b")),
}


@pytest.fixture(params=["finished", "unfinished"])
def recorded(finished: Place, request: pytest.FixtureRequest) -> Place:
    """A run that is complete, and one whose second span has yet to be replayed."""
    if request.param == "unfinished":
        marker(finished.out, "train", 1).unlink()
    return finished


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_other_than_recorded_is_refused_by_name(recorded: Place, case: str) -> None:
    options, words = SETTINGS[case]
    line = recorded.refuses("this run was made with", *words, "--out", options=options)
    assert "None" not in line
    assert "[]" not in line


def test_a_setting_as_recorded_is_no_other_setting(recorded: Place) -> None:
    assert (
        recorded.run("--rule", "simpson", "--tolerance", "0.001", "--keep", "parameters").exit_code
        == 0
    )


OTHER_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "content of a step between spans": (
        lambda ck: write_step(ck, STEPS[2], iterates()[0]),
        ("the content of step 20 differs",),
    ),
    "content of the last step": (
        lambda ck: write_step(ck, STEPS[-1], iterates()[0]),
        ("the content of step 60 differs",),
    ),
    "a middle step missing": (lambda ck: step_file(ck, MIDDLE).unlink(), ("step 30 is missing",)),
    "the first step missing": (lambda ck: step_file(ck, STEPS[0]).unlink(), ("step 0 is missing",)),
    "the last step missing": (
        lambda ck: step_file(ck, STEPS[-1]).unlink(),
        ("step 60 is missing",),
    ),
    "a step inserted in the middle": (
        lambda ck: write_step(ck, 35, iterates()[0]),
        ("step 35 is new", "before step 40"),
    ),
}


@pytest.mark.parametrize("case", OTHER_CHECKPOINTS)
def test_other_checkpoints_than_recorded_are_refused(recorded: Place, case: str) -> None:
    change, words = OTHER_CHECKPOINTS[case]
    change(recorded.checkpoints)
    recorded.refuses("other checkpoints than", str(recorded.out), *words, "Restore them", "--out")


OTHER_LOSSES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "another function": (
        TRAIN_LOSS,
        '"train": Loss(F.multi_margin_loss, on="train")',
        ("value and gradient norm at the first checkpoint",),
    ),
    "another split": (
        TRAIN_LOSS,
        '"train": Loss(F.cross_entropy, on="validation")',
        ("its on was train, now validation",),
    ),
    "another kind": (
        TRAIN_LOSS,
        '"train": Loss(call=cross_entropy)',
        ("its kind was function, now call",),
    ),
    "fewer data": (
        TRAIN_DATA,
        "train = (inputs[:29], targets[:29])",
        ("its examples was 30, now 29",),
    ),
    "other data": (
        TRAIN_DATA,
        "train = (inputs[10:], targets[10:])",
        ("value and gradient norm at the first checkpoint",),
    ),
}


@pytest.mark.parametrize("case", OTHER_LOSSES)
def test_another_loss_under_a_recorded_name_is_refused(recorded: Place, case: str) -> None:
    old, new, words = OTHER_LOSSES[case]
    write_task(recorded.task, old, new)
    recorded.refuses("loss 'train' is not the one recorded", *words, "another name", "--out")


OTHER_TASK = (
    "def task():",
    "def other():\n"
    "    return Task(model=Net, data={'train': train}, losses={'train': "
    "Loss(F.multi_margin_loss)})\n\n\ndef task():",
)


def test_another_function_of_the_same_file_is_another_task(place: Place) -> None:
    write_task(place.task, *OTHER_TASK)
    assert place.run().exit_code == 0
    result = run_lca(place.checkpoints, f"{place.task}:other", place.out)
    refused(
        result,
        "loss 'train' is not the one recorded",
        "value and gradient norm at the first checkpoint",
    )


def test_a_module_that_was_edited_is_looked_at_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place.task.parent)
    module = write_task(place.task.parent / "edited_task_module.py")
    assert run_lca(place.checkpoints, "edited_task_module:task", place.out).exit_code == 0
    write_task(module, TRAIN_LOSS, '"train": Loss(F.multi_margin_loss, on="train")')
    sys.modules.pop(module.stem)  # as in a new process
    state._STATES.clear()
    result = run_lca(place.checkpoints, "edited_task_module:task", place.out)
    refused(
        result,
        "loss 'train' is not the one recorded",
        "value and gradient norm at the first checkpoint",
    )


def test_a_comment_in_the_task_file_disturbs_nothing(recorded: Place) -> None:
    write_task(recorded.task, "def task():", "# a comment\ndef task():")
    assert recorded.run().exit_code == 0


def test_another_model_than_recorded_is_refused(recorded: Place) -> None:
    write_task(recorded.task, "Linear(64, 8)", "Linear(64, 8, bias=False)")
    recorded.refuses("'hidden.bias'", "not in the task's model")


# --- no space
# ----------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of a given size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def mount(self, options: str) -> None:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"cannot mount a small tmpfs: {made.stderr.strip()}")

    def fill(self) -> None:
        block = bytes(2**16)
        with (self.path / "filler").open("wb", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while file.write(block[:size]) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    try:
        yield made
    finally:
        while os.path.ismount(made.path):
            subprocess.run(["umount", made.path], check=True)


@pytest.fixture
def on_disk(place: Place, disk: SmallDisk) -> Place:
    place.out = disk.path / "run.lca"
    return place


def _completes_as(place: Place, clean_run: Path) -> None:
    """Run again, the run is complete, equal to one that never lacked space, and holds nothing
    temporary.
    """
    result = place.run()
    assert result.exit_code == 0, result.stderr
    assert contents(place.out / "data.zarr") == contents(clean_run / "run.lca" / "data.zarr")
    left = [
        path
        for path in place.out.parent.rglob("*")
        if ".partial" in path.name or path.name.endswith(".tmp")
    ]
    assert left == []


def test_a_result_that_cannot_fit_is_refused_up_front_with_bytes_needed_and_free(
    on_disk: Place, disk: SmallDisk
) -> None:
    disk.mount("size=64k")
    line = refused(on_disk.run(), str(disk.path), "--keep tensors", "--out", code=5)
    assert list(disk.path.iterdir()) == []
    amounts = re.findall(r"(\d[\d.,]*)\s?([kMG]?B)\b", line)
    assert len(amounts) == 3, line  # expected, at most, and free
    assert all(float(number.replace(",", "")) > 0 for number, _ in amounts), line


@pytest.mark.parametrize("kibibytes", [192, 256, 320, 384, 448, 512, 576, 1024])
def test_on_a_disk_somebody_else_fills_a_run_is_whole_or_says_there_is_no_space(
    on_disk: Place,
    disk: SmallDisk,
    clean_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    kibibytes: int,
) -> None:
    disk.mount(f"size={kibibytes}k")
    with monkeypatch.context() as patch:
        # as if the space went after the check
        patch.setattr("lca_posthoc.store.required_bytes", lambda *_: 0)
        result = on_disk.run()
    if result.exit_code:
        refused(result, "no space", code=5)
    disk.mount("remount,size=64m")
    _completes_as(on_disk, clean_run)


@pytest.mark.parametrize("kibibytes", [80, 96, 128, 160, 192, 224, 256, 512])
def test_space_that_runs_out_while_a_run_is_created_leaves_nothing_in_the_way(
    on_disk: Place, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, kibibytes: int
) -> None:
    """Two checkpoints: the files that describe the arrays take more than the arrays."""
    disk.mount(f"size={kibibytes}k")
    options = ("--steps", "0:10")
    with monkeypatch.context() as patch:
        # as if the space went after the check
        patch.setattr("lca_posthoc.store.required_bytes", lambda *_: 0)
        result = on_disk.run(*options)
    if result.exit_code:
        refused(result, "no space", code=5)
    disk.mount("remount,size=64m")
    result = on_disk.run(*options)
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in disk.path.iterdir()] == ["run.lca"]


@pytest.mark.parametrize("span", [0, 1, 2])
def test_space_that_runs_out_while_a_span_is_written_is_said_and_freed_the_run_completes(
    on_disk: Place, disk: SmallDisk, clean_run: Path, monkeypatch: pytest.MonkeyPatch, span: int
) -> None:
    disk.mount("size=8m")
    with monkeypatch.context() as patch:
        _before_span(patch, span, disk.fill)
        refused(on_disk.run(), "no space left", "run again", code=5)
    assert _spans(on_disk) == (span, 3, False)
    disk.free()
    _completes_as(on_disk, clean_run)


def test_space_that_runs_out_before_the_first_span_is_said_and_freed_the_run_completes(
    on_disk: Place, disk: SmallDisk, clean_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.mount("size=8m")
    create = replay.store.create

    def create_and_fill(*arguments: Any) -> Any:
        made = create(*arguments)
        disk.fill()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(replay.store, "create", create_and_fill)
        refused(on_disk.run(), "no space left", "run again", code=5)
    disk.free()
    _completes_as(on_disk, clean_run)


def test_space_that_runs_out_while_a_loss_is_added_leaves_the_others_readable(
    on_disk: Place, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.mount("size=8m")
    assert on_disk.run().exit_code == 0
    before = lca("summary", on_disk.out, "--json").stdout
    with monkeypatch.context() as patch:
        patch.setattr(replay._Job, "_check_space", lambda *_: disk.fill())
        refused(on_disk.run("--loss", "all"), "no space left", code=5)
    assert lca("summary", on_disk.out, "--json").stdout == before
    disk.free()
    assert set(document(on_disk.run("--loss", "all", "--json"))["losses"]) == {
        "train",
        "validation",
    }


# --- tracebacks, and commands that read a run
# --------------------------------------------------------------------------


def test_a_traceback_is_shown_when_asked_for(place: Place) -> None:
    write_task(place.task, RETURN, f"    raise KeyError('split')\n{RETURN}")
    result = lca("--debug", "run", place.checkpoints, "--task", place.task, "--cluster", "inline")
    assert result.exit_code == 2
    says(result.stderr, "Traceback (most recent call last)", "in task\n", "KeyError: 'split'")
    assert result.stderr.splitlines()[-1].startswith("lca: ")


NOT_RUNS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a file": lambda path: path.write_text("mine"),
    "an empty directory": lambda path: path.mkdir(),
    "a directory of checkpoints": record,
}


@pytest.mark.parametrize("command", ["summary", "status"])
@pytest.mark.parametrize("case", NOT_RUNS)
def test_what_is_not_a_run_cannot_be_read_as_one(tmp_path: Path, command: str, case: str) -> None:
    NOT_RUNS[case](tmp_path / "it")
    before = contents(tmp_path)
    refused(
        lca(command, tmp_path / "it"), str(tmp_path / "it"), "is not a run directory", "lca run"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["summary", "status"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "tensors": 3}']
)
def test_a_run_whose_record_is_damaged_is_a_failure_that_names_it(
    finished: Place, command: str, text: str
) -> None:
    (finished.out / "run.json").write_text(text)
    refused(lca(command, finished.out), str(finished.out), code=1)


def test_a_loss_the_run_does_not_have_is_refused_by_name(finished: Place) -> None:
    refused(lca("summary", finished.out, "--loss", "nope"), "no loss 'nope'", "'train'")


def test_a_run_without_a_finished_segment_has_no_summary(finished: Place) -> None:
    for each in (finished.out / "commits" / "train").iterdir():
        each.unlink()
    refused(lca("summary", finished.out), "'train'", "no finished segment", "lca run", code=1)
    assert _spans(finished) == (0, 3, False)
