"""Rows of HDF5 become the tensors of the task's model, or are refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.helpers.cli import (
    contents,
    iterates,
    last_line,
    lca,
    refused,
    run_lca,
    says,
    step_file,
    write_task,
)

from ..helpers.saved_checkpoints import State, equal, told


def flat(state: State) -> np.ndarray[Any, Any]:
    return np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()])


def rows(place: Path, name: str = "all_weights", dtype: str = "f4", **options: Any) -> Path:
    """A row for every iterate, in the order of the model's parameters."""
    table = np.stack([flat(state) for state in iterates()]).astype(dtype)
    with h5py.File(place, "w") as file:
        file.create_dataset(name, data=table, **options)
    return place


STORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "in chunks": {"chunks": (3, 100), "compression": "gzip"},
    "double": {"dtype": "f8"},
    "big-endian": {"dtype": ">f4"},
    "half": {"dtype": "f2"},
    "in a group": {"name": "run/weights"},
}


@pytest.mark.parametrize("case", STORED)
def test_rows_of_hdf5_become_tensors_in_the_order_of_the_models_parameters(
    tmp_path: Path, case: str
) -> None:
    options = STORED[case]
    source, task = rows(tmp_path / "weights", **options), write_task(tmp_path / "task.py")
    chosen = {"dataset": options["name"]} if "name" in options else {}
    heard = told(source, tmp_path / "st", task=task, **chosen)
    dtype = {"f8": torch.float64, "f2": torch.float16}.get(options.get("dtype", ""), torch.float32)
    equal(
        tmp_path / "st",
        {
            row: {name: tensor.to(dtype) for name, tensor in state.items()}
            for row, state in enumerate(iterates())
        },
    )
    order = "hidden.weight [8, 64], hidden.bias [8], out.weight [4, 8], out.bias [4]"
    says(
        " ".join(heard),
        order,
        "Nothing is transposed",
        "Keras",
        "loss_start",
        "training steps 0, 1, 2",
    )
    assert any("half precision" in each for each in heard) == (case == "half")


def test_an_interrupted_import_of_hdf5_goes_on(tmp_path: Path) -> None:
    source, task, place = rows(tmp_path / "w.h5"), write_task(tmp_path / "task.py"), tmp_path / "st"
    told(source, place, task=task)
    whole = contents(place)
    for row in (2, 5):
        step_file(place, row).unlink()
    told(source, place, task=task)
    assert contents(place) == whole
    with h5py.File(source, "a") as file:
        file["all_weights"][3, 7] += 1
    refused(
        lca("import", source, place, "--task", task),
        "step_00000003",
        "row 3 of",
        "not imported from",
    )


def test_buffers_rows_do_not_hold_are_named(tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "task.py",
        "self.out =",
        "self.register_buffer('seen', torch.ones(2)); self.out =",
    )
    heard = told(rows(tmp_path / "w.h5"), tmp_path / "st", task=task)
    says(" ".join(heard), "rows do not hold 'seen'", "Task(fixed=[…])")
    refused(run_lca(tmp_path / "st", task, tmp_path / "run"), "'seen'", "missing")
    fixed = write_task(tmp_path / "fixed.py", "losses={", "fixed=['seen'], losses={")
    fixed.write_text(
        fixed.read_text().replace(
            "self.out =", "self.register_buffer('seen', torch.ones(2)); self.out ="
        )
    )
    assert run_lca(tmp_path / "st", fixed, tmp_path / "run").exit_code == 0


def hdf5(fill: Callable[[Any], object]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        with h5py.File(place, "w") as file:
            fill(file)
        return place

    return make


def elsewhere(place: Path) -> Path:
    rows(place.with_name("secret.h5"))
    with h5py.File(place, "w") as file:
        file["all_weights"] = h5py.ExternalLink("secret.h5", "all_weights")
    return place


def raw(place: Path) -> Path:
    place.with_name("secret").write_bytes(bytes(7 * 556 * 4))
    with h5py.File(place, "w") as file:
        file.create_dataset(
            "all_weights",
            (7, 556),
            "f4",
            external=[(str(place.with_name("secret")), 0, 7 * 556 * 4)],
        )
    return place


def virtual(place: Path) -> Path:
    rows(place.with_name("secret.h5"))
    layout = h5py.VirtualLayout((7, 556), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "all_weights", (7, 556))
    with h5py.File(place, "w") as file:
        file.create_virtual_dataset("all_weights", layout)
    return place


def keras(file: Any) -> None:
    file.attrs["layer_names"] = ["dense"]


def cut(place: Path) -> Path:
    os.truncate(rows(place), 3000)
    return place


ODD_HDF5: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "another dataset": (
        lambda place: rows(place, "weights"),
        ("no dataset 'all_weights'", "'weights' [7, 556]", "--dataset"),
    ),
    "no dataset": (hdf5(lambda file: file.create_group("a")), ("it has none",)),
    "a group": (hdf5(lambda file: file.create_group("all_weights")), ("no dataset 'all_weights'",)),
    "a vector": (
        hdf5(lambda file: file.create_dataset("all_weights", data=np.ones(556))),
        ("[556]", "not a table"),
    ),
    "integers": (
        hdf5(lambda file: file.create_dataset("all_weights", (7, 556), "i4")),
        ("int32", "not a table"),
    ),
    "a number too few": (
        hdf5(lambda file: file.create_dataset("all_weights", (7, 555), "f4")),
        ("has 555 numbers", "has 556 parameters", "hidden.weight [8, 64]", "Build the model"),
    ),
    "one row": (
        hdf5(lambda file: file.create_dataset("all_weights", (1, 556), "f4")),
        ("only one checkpoint",),
    ),
    "Keras": (hdf5(keras), ("Keras weights file", "transposed")),
    "a link to another file": (elsewhere, ("lies in other files",)),
    "numbers in another file": (raw, ("lies in other files",)),
    "rows of another file": (virtual, ("lies in other files",)),
    "cut short": (cut, ("cannot be read as HDF5",)),
}


@pytest.mark.parametrize("case", ODD_HDF5)
def test_hdf5_that_is_no_series_of_the_tasks_model_is_refused(tmp_path: Path, case: str) -> None:
    make, words = ODD_HDF5[case]
    source, task = make(tmp_path / "weights.h5"), write_task(tmp_path / "task.py")
    refused(lca("import", source, tmp_path / "st", "--task", task), *words)
    assert not (tmp_path / "st").exists()


def test_hdf5_needs_a_task_whose_model_can_be_built(tmp_path: Path) -> None:
    source = rows(tmp_path / "weights.h5")
    refused(lca("import", source, tmp_path / "st"), "numbers without names", "--task")
    refused(
        lca("import", source, tmp_path / "st", "--task", tmp_path / "none.py"),
        "none.py does not exist",
    )
    broken = write_task(tmp_path / "broken.py", "super().__init__()", "super().__init__(); 1 / 0")
    refused(
        lca("import", source, tmp_path / "st", "--task", broken),
        "Task.model() raised ZeroDivisionError",
    )
    lazy = write_task(tmp_path / "lazy.py", "nn.Linear(64, 8)", "nn.LazyLinear(8)")
    refused(lca("import", source, tmp_path / "st", "--task", lazy), "lazily built", "Task.model")
    refused(
        lca("import", source, tmp_path / "st", "--key", "model"), "--key does not apply", "HDF5"
    )


def test_without_h5py_hdf5_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, task = rows(tmp_path / "weights.h5"), write_task(tmp_path / "task.py")
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = lca("import", source, tmp_path / "st", "--task", task)
    refused(result, "HDF5 needs the package h5py", "pip install h5py", code=5)
    assert last_line(result)
