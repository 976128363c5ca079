"""Read selected tensors of a safetensors file, each directly into its own memory.

The file is never memory-mapped: if another program truncated it, the process would crash. It is not
read whole either, which would take twice the memory of its tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .headers import TensorHeader, fingerprint_of, size_and_fingerprint, tensor_places
from .paths import is_remote, read

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def fingerprint_and_tensors(
    path: Path, key: int, names: Collection[str]
) -> tuple[int, dict[str, Tensor]]:
    """Read some tensors of a file onto the CPU, and its fingerprint.

    Args:
        path: path of the file; a remote file is read whole and stays in the cache.
        key: key of the file in the cache.
        names: names of the tensors in the file; names it lacks are skipped.

    Raises:
        OSError: if the file cannot be read or ends early.
        InputError: if it is not a complete safetensors file.
    """
    if is_remote(path) or sys.byteorder == "big":
        data = read(path, key)
        tensors = safetensors.torch.load(data)
        return fingerprint_of(data), {name: tensors[name] for name in names if name in tensors}
    with path.open("rb") as file:
        tensors = {
            name: read_place(file, header, place)
            for name, (header, place) in tensor_places(path, file, names).items()
        }
        # Compute this last: it then describes the file that the tensors came from.
        _, own = size_and_fingerprint(path, file)
    return own, tensors


def read_place(file: BinaryIO, header: TensorHeader, place: range) -> Tensor:
    """Read one tensor from a byte range of an open file.

    Args:
        file: file opened in binary mode.
        header: type and shape of the tensor.
        place: byte range of its data.

    Raises:
        OSError: if the file ends early.
    """
    file.seek(place.start)
    data = np.fromfile(file, "uint8", len(place))
    if len(data) < len(place):
        raise OSError(f"it ends {len(place) - len(data):,} bytes early")
    dtype = DTYPES[header.dtype]
    if not len(data):  # torch cannot view an empty array as another type
        return torch.empty(header.shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(header.shape)
