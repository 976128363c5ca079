"""What cannot be saved stops training with what is wrong, and leaves no hole in the series."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lca_posthoc import Recorder
from lca_posthoc.errors import InputError, ResourceError
from lca_posthoc.recording import writer
from tests.helpers.numbered_training import network

from ..helpers.recorded_series import HERE, interrupt_now, names, saved, steps_in

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.LazyLinear(3), "has no values in memory"),
        (lambda: nn.Linear(3, 2, device="meta"), "has no values in memory"),
        (
            lambda: nn.Linear(3, 2, dtype=torch.complex128),
            "is torch.complex128, which safetensors cannot hold",
        ),
    ],
)
def test_tensors_that_a_file_cannot_hold_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Recorder(tmp_path / "ck", build()).save(0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800pair"])
def test_names_that_a_file_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    model = nn.ReLU()
    model.register_parameter(name, nn.Parameter(torch.ones(2)))
    with pytest.raises(InputError, match="has a name that safetensors cannot hold"):
        Recorder(tmp_path / "ck", model).save(0)
    assert names(tmp_path) == []


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's older one, which leaves a process a nameless part of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.ones(3))


def _zero3() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight.ds_id = 0  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("build", [FullyShardedDataParallel, _zero3])
def test_weights_of_which_a_process_has_a_part_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    with pytest.raises(
        InputError,
        match=r"the model is sharded by (FullyShardedDataParallel|DeepSpeed's ZeRO-3), "
        r"which leaves each process a part",
    ):
        Recorder(tmp_path / "ck", build()).save(0)
    assert names(tmp_path) == []


def test_a_buffer_that_is_made_on_the_way_and_is_not_persistent_disturbs_nothing(
    tmp_path: Path, linear: nn.Module
) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        linear.register_buffer("cache", torch.ones(5), persistent=False)
        recorder.save(1)
    assert [set(load_file(path)) for path in names(tmp_path)] == [{"weight", "bias"}] * 2


def test_a_default_device_of_the_process_is_not_the_recorders(
    tmp_path: Path, linear: nn.Module
) -> None:
    with torch.device("meta"):
        (path,) = saved(tmp_path, linear, 0)
    assert torch.equal(load_file(path)["weight"], linear.weight)  # type: ignore[arg-type]


def test_failing_to_copy_neither_holds_the_directory_nor_the_memory(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(writer, "_MEMORY", 0)
    with Recorder(tmp_path, linear) as recorder:
        with monkeypatch.context() as patch:
            patch.setattr("lca_posthoc.recording.recorder.Stager", fails)
            with pytest.raises(MemoryError):
                recorder.save(0)
        recorder.save(0)
        with monkeypatch.context() as patch:
            patch.setattr("lca_posthoc.recording.recorder.Stager.stage", fails)
            for _ in range(2 * writer.FEWEST):
                with pytest.raises(MemoryError):
                    recorder.save(1)
        recorder.save(1)
    assert steps_in(tmp_path) == [0, 1]


def _grow(model: nn.Module) -> None:
    model.extra = nn.Parameter(torch.ones(1))


def _shrink(model: nn.Module) -> None:
    model.bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.double(),
            r"'(weight|bias)' of the model was torch.float32 .* and is "
            r"torch.float64",
        ),
        (_shrink, "'bias' of the model was .* and is absent"),
        (_grow, "'extra' of the model was absent .* and is torch.float32"),
    ],
)
def test_a_series_holds_one_set_of_tensors(
    tmp_path: Path, linear: nn.Module, change: Callable[[nn.Module], Any], message: str
) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        change(linear)
        with pytest.raises(InputError, match=message):
            recorder.save(1)
    assert steps_in(tmp_path) == [0]


class _Failing:
    """Fails while the file of some steps is half written, as often as told."""

    def __init__(self, code: int, steps: range, times: int = 10**9) -> None:
        self.code, self.steps, self.times, self.put = code, steps, times, writer._put

    def __call__(self, path: str, header: bytes, body: memoryview) -> None:
        if self.times and any(f"{step:08d}" in path for step in self.steps):
            self.times -= 1
            self.put(path, header)
            raise OSError(self.code, os.strerror(self.code))
        self.put(path, header, body)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Failing], None]:
    return lambda fault: monkeypatch.setattr(writer, "_put", fault)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_what_cannot_be_written_stops_training_and_leaves_no_hole(
    tmp_path: Path, failing: Callable[[_Failing], None], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MEMORY", 0)
    failing(_Failing(code, range(3, 4), 1))
    done: list[int] = []
    recorder = Recorder(tmp_path, network())
    said = f"cannot write .*step_00000003.*{os.strerror(code)}; the last recorded iterate is step 2"
    with pytest.raises(ResourceError, match=said):
        _save_on(recorder, done)
    assert len(done) <= 3 + writer.FEWEST + 1
    with pytest.raises(ResourceError, match="step_00000003"):
        recorder.close()
    assert steps_in(tmp_path) == [0, 1, 2]


def _save_on(recorder: Recorder, done: list[int], until: int = 1000) -> None:
    for step in range(until):
        recorder.save(step)
        done.append(step)


def _save_and(action: Callable[[], Any], recorder: Recorder) -> None:
    with recorder:
        recorder.save(0)
        action()


def test_an_error_is_raised_at_the_latest_when_closing(
    tmp_path: Path, failing: Callable[[_Failing], None]
) -> None:
    failing(_Failing(errno.ENOSPC, range(1)))
    with (
        pytest.raises(ResourceError, match="nothing was recorded"),
        Recorder(tmp_path, network()) as recorder,
    ):
        recorder.save(0)
    assert names(tmp_path) == []


def test_an_error_of_training_stands_before_that_of_the_recorder(
    tmp_path: Path, failing: Callable[[_Failing], None]
) -> None:
    failing(_Failing(errno.ENOSPC, range(1)))
    with pytest.raises(ZeroDivisionError) as found:
        _save_and(lambda: 1 / 0, Recorder(tmp_path, network()))
    assert "the recorder, too: cannot write" in found.value.__notes__[0]


def test_an_error_inside_the_context_is_not_swallowed_and_what_was_saved_stays(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _save_and(interrupt_now, Recorder(tmp_path, network()))
    assert steps_in(tmp_path) == [0]


def test_a_full_disk_pauses_recording_where_that_was_chosen(
    tmp_path: Path, failing: Callable[[_Failing], None]
) -> None:
    failing(_Failing(errno.ENOSPC, range(2, 4)))
    recorder = Recorder(tmp_path, network(), on_full="pause")
    with pytest.warns(
        UserWarning, match="no space for .*step_00000002.*recording pauses until there is"
    ) as warned:
        _save_and(lambda: [recorder.save(step) for step in range(1, 6)], recorder)
    assert len(warned) == 1
    assert recorder.left_out == [2, 3]
    assert steps_in(tmp_path) == [0, 1, 4, 5]


def test_a_file_larger_than_the_process_may_write_stops_training_with_whole_files_alone(
    tmp_path: Path,
) -> None:
    """A real limit: the kernel cuts the file short."""
    script = (
        "import resource, sys, torch\nfrom lca_posthoc import Recorder\nfrom lca_posthoc.errors "
        "import ResourceError\n"
        "recorder = Recorder(sys.argv[1], torch.nn.Linear(300, "
        "300))\nrecorder.save(0)\nrecorder.flush()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try:\n    for step in range(1, 100):\n        recorder.save(step)\nexcept ResourceError "
        "as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=120,
        check=False,
    )
    assert "cannot write" in done.stdout
    assert "File too large; the last recorded iterate is step 0" in done.stdout
    assert steps_in(tmp_path) == [0]
