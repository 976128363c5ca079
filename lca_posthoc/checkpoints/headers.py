"""Read and check the header of a safetensors file without touching its tensors.

Format: 8 bytes (little-endian length n), n bytes of JSON, the tensors' bytes. Source:
<https://github.com/huggingface/safetensors#format>. Size limits are checked first, so that a
hostile header costs nothing.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from ..errors import InputError
from .paths import is_remote, reached

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
_REMEMBERED_BYTES = 2**20
_SAMPLE = 64 * 2**10
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
_SHOWN = 512  # leading bytes of a file that reveal its format
_AS_PYTORCH = (
    "give it the ending .pt, and make safetensors of the directory with `lca import DIRECTORY "
    "NEW_DIRECTORY`."
)
GGUF = (
    "GGUF, a format for inference: its weights are quantised and packed, so most steps of training "
    "are rounded away and torch cannot load them by name. Give the safetensors or torch.save files "
    "that it was converted from."
)
_OTHERS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"GGUF",), GGUF),
    ((b"PK\x03\x04", b"PK\x05\x06"), f"a zip archive, as torch.save writes it: {_AS_PYTORCH}"),
    (
        tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6)),
        f"a pickle, as older torch.save wrote it: {_AS_PYTORCH}",
    ),
    (
        (b"\x89HDF\r\n\x1a\n",),
        "HDF5: if it has a row for every iterate, give it the ending .h5 and convert it with "
        "`lca import FILE NEW_DIRECTORY`.",
    ),
    (
        (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"),
        "compressed (gzip, zstd, bzip2 or xz): decompress it.",
    ),
    (
        (b"\x93NUMPY",),
        "one array of numpy: save the named tensors with safetensors.numpy.save_file.",
    ),
    (
        (b"version https://git-lfs",),
        "a Git LFS pointer and not the file it stands for: fetch the file with `git lfs pull`.",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error"),
        "a page of HTML or XML, perhaps a server's answer instead of the file: read it, and "
        "download the file again.",
    ),
    (
        (b"{", b"["),
        "text in JSON, perhaps a server's answer instead of the file: read it, and download the "
        "file again.",
    ),
)
FLOATING = frozenset({"F8_E5M2", "F8_E4M3", "F8_E8M0", "F16", "BF16", "F32", "F64"})
HALF = FLOATING - {"F32", "F64"}


@dataclass(frozen=True)
class TensorHeader:
    """State the type and shape of one tensor, from the header of its file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """Hold a checked header.

    Attributes:
        tensors: type and shape of each tensor, by name.
        metadata: the file's own metadata.
        size: size of the file in bytes.
        fingerprint: CRC32C of samples of the file.
        data_size: number of bytes of tensor data; they end the file.
        data_samples: CRC32C of the tensor data in each sample; the last sample is the last 64 KiB
            of the file.
    """

    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]
    size: int
    fingerprint: int
    data_size: int
    data_samples: tuple[int, ...]


def joined(fingerprints: Iterable[int]) -> int:
    """Combine the fingerprints of a checkpoint's files, in order, into one."""
    fingerprint = 0
    for own in fingerprints:
        fingerprint = (fingerprint * 31 + own) % 2**32
    return fingerprint


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
        InputError: if the file cannot be read or has another format; the message says what to do.
        _DamagedError: if it is not a complete safetensors file.
    """
    try:
        with reached(path), path.open("rb") as file:
            shown = file.read(_SHOWN)
            return _checked_header(path, file)
    except _DamagedError:
        if (other := _other_format(shown)) is not None:
            raise InputError(
                f"{path} is not a safetensors file, as its name says, but {other}"
            ) from None
        raise
    except OSError as error:
        raise InputError(
            f"cannot read checkpoint file {path}: {error.strerror}. Check the path and its "
            "permissions."
        ) from None


def size_and_fingerprint(path: Path, file: BinaryIO) -> tuple[int, int]:
    """Return the size of an open file in bytes and the CRC32C of samples of it, whatever its
    format.

    Args:
        path: path of the file.
        file: the same file, opened in binary mode.
    """
    size = file.seek(0, os.SEEK_END)
    return size, fingerprint(_reader(path, file), size)


def _checked_header(path: Path, file: BinaryIO) -> Header:
    size = file.seek(0, os.SEEK_END)
    text = _header_text(path, file, size)
    table = _parse(path, text)
    data_size = max((end for _, end in table.places.values()), default=0)
    start = 8 + len(text)
    if start + data_size != size:
        missing = start + data_size - size
        raise _DamagedError(
            _damaged(
                path,
                f"it has {size:,} bytes, {abs(missing):,} too {'few' if missing > 0 else 'many'}",
            )
        )
    samples: list[tuple[int, bytes]] = []
    crc = fingerprint(_remembering(_reader(path, file), samples), size)
    parts = (sample[max(0, start - offset) :] for offset, sample in samples)
    return Header(
        tensors=table.tensors,
        metadata=table.metadata,
        size=size,
        fingerprint=crc,
        data_size=data_size,
        data_samples=tuple(map(google_crc32c.value, parts)),
    )


def tensor_places(
    path: Path, file: BinaryIO, names: Collection[str] | None = None
) -> dict[str, tuple[TensorHeader, range]]:
    """Return the type and shape of tensors of an open file, and their byte ranges in the file.

    Args:
        path: path of the file, for error messages.
        file: the same file, opened in binary mode.
        names: names of the tensors; names that the file lacks are skipped. None for all tensors.

    Raises:
        InputError: if the file is not complete.
    """
    text = _header_text(path, file, file.seek(0, os.SEEK_END))
    table, start = _parse(path, text), 8 + len(text)
    wanted = table.places.keys() if names is None else table.places.keys() & names
    places = sorted((*table.places[name], name) for name in wanted)  # one after another on disk
    return {
        name: (table.tensors[name], range(start + begin, start + end))
        for begin, end, name in places
    }


def _header_text(path: Path, file: BinaryIO, size: int) -> bytes:
    """Return the JSON of the header after checking its length.

    Raises:
        _DamagedError: if the length is impossible.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
    if not 2 <= length <= size - 8:
        raise _DamagedError(
            _damaged(path, f"its {size:,} bytes do not begin with a safetensors header")
        )
    if length > MAX_HEADER_BYTES:
        raise _DamagedError(
            _damaged(path, f"its header claims {length:,} bytes (limit {MAX_HEADER_BYTES:,})")
        )
    return file.read(length)


def _reader(path: Path, file: BinaryIO) -> Callable[[int, int], bytes]:
    """Return a function `(offset, count) -> bytes` that reads only these bytes of a local file, if
    the system can.
    """
    if is_remote(path) or not hasattr(os, "pread"):  # Windows lacks pread
        return lambda offset, count: (file.seek(offset), file.read(count))[1]
    return lambda offset, count: os.pread(file.fileno(), count, offset)


def _remembering(
    read: Callable[[int, int], bytes], samples: list[tuple[int, bytes]]
) -> Callable[[int, int], bytes]:
    """Wrap a reader so that it appends each offset and what it reads to `samples`."""

    def reader(offset: int, count: int) -> bytes:
        samples.append((offset, read(offset, count)))
        return samples[-1][1]

    return reader


def _other_format(shown: bytes) -> str | None:
    """Identify a file that is not safetensors by its first bytes, with advice; None if they match
    no known format.

    The caller must already know that the file is not safetensors: its first eight bytes are a
    length and may look like anything.
    """
    text = shown.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for marks, what in _OTHERS:
        if shown.startswith(marks) or (marks[0][:1] in b"<{v" and text.startswith(marks)):
            return what
    return None


class _DamagedError(InputError):
    """Report a file that is not a complete safetensors file."""


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path} is not a whole safetensors file: {what}. Save it again, or remove it (the segment "
        "across the gap becomes longer)."
    )


@dataclass(frozen=True)
class _Table:
    """Hold what a header says: its tensors, its metadata, and the begin and end of each tensor's
    data.
    """

    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]
    places: Mapping[str, tuple[int, int]]


def _parse(path: Path, text: bytes) -> _Table:
    """Parse the JSON of a header.

    Raises:
        _DamagedError: if the header is invalid.
    """
    try:
        return _table(text) if len(text) > _REMEMBERED_BYTES else _remembered_table(text)
    except _InvalidError as error:
        raise _DamagedError(_damaged(path, str(error))) from None


class _InvalidError(Exception):
    """Say what is wrong with a header."""


def _table(text: bytes) -> _Table:
    """Parse the JSON of a header.

    Raises:
        _InvalidError: if the header is invalid.
    """
    if text.count(b"{") > MAX_TENSORS + 2:
        raise _InvalidError(f"it names more than {MAX_TENSORS:,} tensors")
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_int=short_integer
        )
    except (ValueError, RecursionError) as error:
        raise _InvalidError(f"its header is not valid JSON ({str(error)[:80]})") from None
    if not isinstance(entries, dict):
        raise _InvalidError("its header is not a table of tensors")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _InvalidError("its metadata is not a table of words")
    try:
        json.dumps([*entries, metadata], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _InvalidError("its header holds half a surrogate pair") from None
    places, tensors = {}, {}
    for name, entry in entries.items():
        tensors[name], *ends = _entry(name, entry)
        places[name] = (ends[0], ends[1])
    position = 0
    for begin, end in sorted(places.values()):
        if begin != position:
            raise _InvalidError(f"its tensors overlap or leave a hole at byte {position:,}")
        position = end
    return _Table(tensors, metadata, places)


# tensors of a file are also read one at a time, and parsing takes longer than reading a small one
_remembered_table = functools.lru_cache(maxsize=8)(_table)


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object from its pairs.

    Raises:
        ValueError: if a name occurs twice.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def short_integer(text: str) -> int:
    """Parse a size as safetensors allows it: at most 64 bits, no sign.

    Raises:
        ValueError: if the number is out of that range.
    """
    if len(text) > 19 or text.startswith("-"):
        raise ValueError("a number out of range")
    return int(text)


def _entry(name: str, entry: Any) -> tuple[TensorHeader, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
        elements = 1
        for extent in shape:
            elements *= extent
        fits = (
            whole
            and math.prod(extent or 1 for extent in shape) * _BITS[dtype] < 2**63
            and (end - begin) * 8 == elements * _BITS[dtype]
        )
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise _InvalidError(f"its entry for tensor {name[:80]!r} does not hold together")
    return TensorHeader(dtype, tuple(shape)), begin, end


def fingerprint_of(data: bytes) -> int:
    """Return the fingerprint of a file from all its bytes."""
    return fingerprint(lambda offset, count: data[offset : offset + count], len(data))


def fingerprint(read: Callable[[int, int], bytes], size: int) -> int:
    """Return the CRC32C of the first, middle and last 64 KiB of a file.

    Samples suffice, because any training step changes nearly every weight.

    Args:
        read: `(offset, length) -> bytes`.
        size: size of the file in bytes.
    """
    crc = 0
    for offset in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
        crc = google_crc32c.extend(crc, read(offset, _SAMPLE))
    return crc
