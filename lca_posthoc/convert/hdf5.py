"""Read an HDF5 file with a row for every iterate and a column for every parameter, the format of
the method's authors.

The file has no names: order and shapes come from a task's model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from ..checkpoints.headers import TensorHeader
from ..checkpoints.trajectory import TensorSpec
from ..errors import InputError, LCAError, few, optional_package
from ..numerics.objective import new_model, tensor_table
from ..tasks.task import Task
from ..tasks.task import loaded as loaded_task
from .series import Iterate, Progress, Series, Tensors, separate

_BLOCK = 256 * 2**20


def is_hdf5(path: Path) -> bool:
    """Return whether a file starts like HDF5."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


class _Rows:
    """Read the rows of a dataset in blocks of whole chunks."""

    def __init__(self, path: Path, dataset: str, names: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.dataset, self._shapes = path, dataset, names
        with self._opened() as table:
            self.rows, self.length = table.shape
            self.dtype = np.dtype(f"f{table.dtype.itemsize}")
            most = max(1, _BLOCK // max(1, self.length * self.dtype.itemsize))
            self._block = max(1, min(most, table.chunks[0] if table.chunks else 1))
        self._from_block = functools.lru_cache(maxsize=1)(self._read_block)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        h5py = optional_package("h5py", "HDF5")
        try:
            with h5py.File(self.path, "r") as file:
                yield _dataset(h5py, file, self.path, self.dataset)
        except LCAError:
            raise
        except Exception as error:  # a damaged file raises OSError, RuntimeError or KeyError
            what = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.path} cannot be read as HDF5: {what}. Copy it again."
            ) from None

    def _read_block(self, block: int) -> np.ndarray[Any, Any]:
        with self._opened() as table:
            return np.asarray(table[block * self._block : (block + 1) * self._block], self.dtype)

    def _row(self, row: int) -> np.ndarray[Any, Any]:
        numbers: np.ndarray[Any, Any] = self._from_block(row // self._block)[row % self._block]
        return numbers

    def read(self, row: int) -> Tensors:
        """Return the tensors of one row, cut from its columns in order."""
        numbers, tensors, start = torch.from_numpy(self._row(row).copy()), Tensors(), 0
        for name, shape in self._shapes.items():
            count = TensorSpec(name, "parameter", shape).elements
            tensors[name] = numbers[start : start + count].reshape(shape)
            start += count
        return separate(tensors)

    def identity(self, row: int) -> str:
        # include the shapes: another order of the parameters cuts other tensors from the row
        cut = repr(list(self._shapes.items())).encode()
        return f"{google_crc32c.extend(google_crc32c.value(cut), self._row(row).tobytes()):08x}"


def _dataset(h5py: Any, file: Any, path: Path, name: str) -> Any:
    """Return a dataset of the file.

    Raises:
        InputError: if it is not a plain two-dimensional table of floating-point numbers in this
            file.
    """
    if (
        "layer_names" in file.attrs
        or "model_weights" in file
        or "_layer_checkpoint_dependencies" in file
    ):
        raise InputError(
            f"{path} is a Keras weights file: one point of training under Keras' own names. Write "
            "every iterate as a step_N.safetensors file under torch's names, kernels transposed."
        )
    table = file.get(name)
    if not isinstance(table, h5py.Dataset):
        tables = [
            f"{key!r} {list(value.shape)}"
            for key, value in file.items()
            if isinstance(value, h5py.Dataset)
        ]
        raise InputError(
            f"{path} has no dataset {name!r}; it has {few(tables, 8) or 'none'}. Name the dataset "
            "that has a row for every iterate with --dataset."
        )
    if table.file.filename != file.filename or table.external or table.is_virtual:
        raise InputError(
            f"dataset {name!r} of {path} lies in other files, which are not read. Copy it into a "
            "single file."
        )
    if table.ndim != 2 or table.dtype.kind != "f" or table.dtype.itemsize > 8:
        raise InputError(
            f"dataset {name!r} of {path} is {table.dtype} {list(table.shape)}, not a table of "
            "floating-point numbers with a row for every iterate and a column for every parameter."
        )
    return table


def open_hdf5(
    path: Path,
    progress: Progress,
    dataset: str = "all_weights",
    task: str | Path | Task | None = None,
) -> Series:
    """Open the rows of a dataset as steps 0, 1, 2, …, cut in the order of the parameters of a
    task's model.

    Args:
        path: the HDF5 file.
        progress: unused.
        dataset: name of the dataset.
        task: task whose model gives order and shapes of the parameters.

    Raises:
        InputError: if the file, the dataset or the task is missing, or they do not match.
        ResourceError: if h5py is not installed.
    """
    optional_package("h5py", "HDF5")
    if task is None:
        raise InputError(
            f"{path} holds numbers without names. Say which model they belong to: --task my_task.py."
        )
    model = _model(task)
    shapes = {spec.name: spec.shape for spec in model if spec.kind == "parameter"}
    rows = _Rows(path, dataset, shapes)
    count = sum(spec.elements for spec in model if spec.kind == "parameter")
    order = few([f"{name} {list(shape)}" for name, shape in shapes.items()], 6)
    if rows.length != count:
        raise InputError(
            f"a row of {dataset!r} in {path} has {rows.length:,} numbers, but the task's model has "
            f"{count:,} parameters: {order}. Build the model that was trained."
        )
    others = [repr(spec.name) for spec in model if spec.kind != "parameter"]
    dtype = f"F{8 * rows.dtype.itemsize}"
    iterates = [
        Iterate(
            row,
            f"row {row} of {path}",
            functools.partial(rows.read, row),
            functools.partial(rows.identity, row),
        )
        for row in range(rows.rows)
    ]
    headers = {name: TensorHeader(dtype, shape) for name, shape in shapes.items()}
    return Series(iterates, headers, _notes(order, others))


def _notes(order: str, others: list[str]) -> list[str]:
    """Note how columns are assigned to parameters, and which tensors the rows lack."""
    notes = [
        "columns are read in the order of the model's parameters, in torch's own layout: "
        f"{order}. Nothing is transposed, and the file does not say whether that is right (Keras' "
        "kernels are (in, out)): compare loss_start of `lca run` with the loss in training",
        "rows are read as training steps 0, 1, 2, …",
    ]
    if others:
        notes.append(
            f"rows do not hold {few(others)}, which the model stores besides its parameters: "
            "`lca run` needs them unless Task(fixed=[…]) names them; running statistics, which "
            "moved, also need --norm-stats batch"
        )
    return notes


def _model(task: str | Path | Task) -> list[TensorSpec]:
    """Return the tensors of a task's model, in its order, without those the task fixes.

    Raises:
        InputError: if the model is lazily built.
    """
    loaded = loaded_task(task)
    model = new_model(loaded)
    if any(map(is_lazy, model.parameters())):
        raise InputError(
            "the task's model is lazily built, so its parameters have no shapes yet. State them in "
            "Task.model."
        )
    return tensor_table(model, "running", loaded.fixed)
