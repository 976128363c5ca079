"""Read files of directions and make directions orthonormal.

A direction is a vector in parameter space along which gradients are taken.

The file is safetensors. It holds every tensor NAME of the model, or some of them, as (k, *shape of
NAME) with the same k for all; in missing tensors the directions are 0. The metadata may hold, under
`directions` and in JSON, their kind, labels, singular values and seed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, few
from .headers import FLOATING, TensorHeader, read_header, tensor_places
from .paths import here
from .reading import DTYPES, read_place
from .trajectory import TensorSpec, drop_options, normalise

METADATA_KEY = "directions"
MAX_DIRECTIONS = 1024
_SHOWN = 3  # names listed in an error
_MAX_METADATA = 2**20
_MAX_WORD = 1000  # characters of a label
_NUMBERS_AT_A_TIME = 2**20
# smallest share of a direction's squared length orthogonal to the earlier ones; less is rounding
_LEAST_OUTSIDE = 1e-10


@dataclass(frozen=True, kw_only=True)
class DirectionsAbout:
    """Hold the metadata of a file of directions; an entry that the file lacks is None or empty."""

    kind: str | None = None
    seed: int | None = None
    labels: tuple[str, ...] = ()
    singular_values: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DirectionsFile:
    """Describe a checked file of directions.

    Attributes:
        path: path of the file.
        directions: k, the number of directions.
        digest: CRC32C of the file's bytes.
        about: metadata of the file.
        sources: the model's name of each tensor → its name in the file.
        tensors: the model's name of each tensor → its type and shape in the file.
    """

    path: Path
    directions: int
    digest: int
    about: DirectionsAbout
    sources: dict[str, str]
    tensors: dict[str, TensorHeader]

    def read(self) -> dict[str, Tensor]:
        """Read the directions onto the CPU, by the model's names, each (k, *shape) in its stored
        type.

        Raises:
            InputError: if the file changed since it was opened.
        """
        names = {source: name for name, source in self.sources.items()}
        tensors: dict[str, Tensor] = {}
        with _opened(self.path) as file:
            if _digest(file) != self.digest:
                raise InputError(
                    f"{self.path} changed since it was opened. Run again when nothing writes there."
                )
            for source, (header, place) in tensor_places(self.path, file).items():
                tensors[names[source]] = read_place(file, header, place)
        return tensors


def open_directions(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str] | None = None,
) -> DirectionsFile:
    """Open a file of directions and check it, including its numbers.

    Args:
        path: path of the file.
        shapes: name → shape of each tensor of the model that directions may cover.
        aliases: other names of tied tensors → the name in `shapes`.

    Raises:
        InputError: if the file is damaged, its tensors do not match the model's, or a number is not
            finite.
    """
    place = here(path, "directions are read from a file system. Copy the file here first.")
    header = read_header(place)
    names = {normalise(name): name for name in shapes}
    names |= {normalise(alias): name for alias, name in (aliases or {}).items()}
    sources = _sources(place, list(header.tensors), names)
    directions = _count(place, header.tensors)
    for name, source in sources.items():
        _check_shape(place, source, header.tensors[source], (directions, *shapes[name]))
    with _opened(place) as file:
        _refuse_not_finite(place, file)
        digest = _digest(file)
    return DirectionsFile(
        path=place,
        directions=directions,
        digest=digest,
        about=_about(place, header.metadata.get(METADATA_KEY), directions),
        sources=sources,
        tensors={name: header.tensors[source] for name, source in sources.items()},
    )


def open_for_model(path: str | Path, table: Iterable[TensorSpec]) -> DirectionsFile:
    """Open a file of directions for the parameters of a model; see `open_directions`.

    Args:
        path: path of the file.
        table: the model's tensors.
    """
    parameters = [spec for spec in table if spec.kind == "parameter"]
    return open_directions(
        path,
        {spec.name: spec.shape for spec in parameters},
        {alias: spec.name for spec in parameters for alias in spec.aliases},
    )


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}. Check the path and its permissions."
        ) from None


def _sources(path: Path, stored: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """Map the model's name of each tensor in a file to its name in the file.

    Raises:
        InputError: if the model lacks a tensor, or two names stand for one tensor.
    """
    unknown = [source for source in stored if normalise(source) not in names]
    if unknown:
        raise InputError(
            f"{path} has directions for {few([*map(repr, unknown)], _SHOWN)}, which the model does not "
            f"have among its parameters (it has {few([*map(repr, names.values())], _SHOWN)}). Make the "
            f"file without: lca basis … {drop_options([*map(normalise, unknown)][:_SHOWN])}"
        )
    sources: dict[str, str] = {}
    for source in stored:
        name = names[normalise(source)]
        if name in sources:
            raise InputError(
                f"{sources[name]!r} and {source!r} in {path} are both tensor {name!r} of the "
                "model. Leave one of them out of the file."
            )
        sources[name] = source
    return sources


def _count(path: Path, tensors: Mapping[str, TensorHeader]) -> int:
    """Return the number of directions in a file, from its first tensor.

    Raises:
        InputError: if the number is 0 or too large, or there is no tensor.
    """
    if not tensors:
        raise InputError(f"{path} holds no tensors, so no directions.")
    name, first = next(iter(tensors.items()))
    if not first.shape or not first.shape[0]:
        raise InputError(
            f"tensor {name!r} in {path} has shape {list(first.shape)}; directions have the shape "
            "(k, *shape of the model's tensor), with k at least 1."
        )
    if first.shape[0] > MAX_DIRECTIONS:
        raise InputError(
            f"{path} holds {first.shape[0]:,} directions; at most {MAX_DIRECTIONS:,} are taken. "
            "Split it, and run once for each part."
        )
    return first.shape[0]


def _check_shape(path: Path, name: str, header: TensorHeader, shape: tuple[int, ...]) -> None:
    if header.dtype not in FLOATING:
        raise InputError(
            f"tensor {name!r} in {path} is of type {header.dtype}; directions are floating numbers."
        )
    if header.shape != shape:
        raise InputError(
            f"tensor {name!r} in {path} has shape {list(header.shape)}, and {list(shape)} is "
            f"needed: {shape[0]} directions, as the file's first tensor has, each of the shape of "
            "the model's tensor."
        )


def digest_of(path: Path) -> int:
    """Return the CRC32C of a file of directions.

    Raises:
        InputError: if the file cannot be read.
    """
    with _opened(path) as file:
        return _digest(file)


def _digest(file: BinaryIO) -> int:
    """Return the CRC32C of an open file."""
    file.seek(0)
    crc = 0
    while part := file.read(2**22):
        crc = google_crc32c.extend(crc, part)
    return int(crc)


def _refuse_not_finite(path: Path, file: BinaryIO) -> None:
    for name, (header, place) in tensor_places(path, file).items():
        size = DTYPES[header.dtype].itemsize
        for start in range(place.start, place.stop, size * _NUMBERS_AT_A_TIME):
            part = range(start, min(place.stop, start + size * _NUMBERS_AT_A_TIME))
            numbers = read_place(file, TensorHeader(header.dtype, (len(part) // size,)), part)
            if not bool(numbers.double().isfinite().all()):
                raise InputError(
                    f"tensor {name!r} in {path} holds NaN or Inf. Write the directions again."
                )


# --- metadata -------------------------------------------------------------------------------------


def _about(path: Path, text: str | None, directions: int) -> DirectionsAbout:
    """Parse the metadata of a file, without trusting it.

    Raises:
        InputError: if an entry is invalid.
    """
    if text is None:
        return DirectionsAbout()
    try:
        entries = json.loads(text) if len(text) <= _MAX_METADATA else None
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise InputError(_odd(path, "is not a JSON object"))
    kind, seed = entries.get("kind"), entries.get("seed")
    if kind is not None and not _is_word(kind):
        raise InputError(_odd(path, "has a kind that is not a short string"))
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise InputError(_odd(path, "has a seed that is not a whole number from 0 to 2⁶³ − 1"))
    labels, values = entries.get("labels", []), entries.get("singular_values", [])
    if not _is_list(labels, directions, _is_word):
        raise InputError(_odd(path, f"does not have one label for each of {directions} directions"))
    if not _is_list(values, directions, _is_size):
        raise InputError(
            _odd(path, f"does not have one singular value for each of {directions} directions")
        )
    return DirectionsAbout(
        kind=kind,
        seed=seed,
        labels=tuple(labels),
        singular_values=tuple(map(float, values)),
    )


def _is_list(value: object, length: int, is_item: Callable[[object], bool]) -> bool:
    """Return whether a value is a list of valid items that is empty or has this length."""
    return (
        isinstance(value, list)
        and len(value) in (0, length)
        and all(is_item(item) for item in value)
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_WORD


def _is_size(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max  # type: ignore[operator]


def _odd(path: Path, what: str) -> str:
    return f"the metadata {METADATA_KEY!r} of {path} {what}. Correct it or remove it."


# --- orthonormal directions -----------------------------------------------------------------------


def orthonormal(directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormalise directions over all tensors together, without changing their span.

    Direction j is a combination of the given directions up to j, with a positive coefficient of
    direction j, as in Gram–Schmidt. The computation uses the Cholesky factor of the inner products,
    twice, in float64.

    Args:
        directions: name → directions of the tensor, (k, *shape), all on one device. The call
            removes the tensors one by one, so that memory holds hardly more than one copy.

    Returns:
        Tensors of the same shapes; float64 if the given one is float64, else float32.

    Raises:
        InputError: if a direction is 0 or a combination of those before it.
    """
    count = next(iter(directions.values())).shape[0]
    width = max(1, _NUMBERS_AT_A_TIME // count)

    def blocks() -> Iterator[Tensor]:
        for tensor in directions.values():
            for part in _in_columns(_flat(tensor), width):
                yield part.double()

    factors = orthonormal_factors(blocks, range(count))
    result: dict[str, Tensor] = {}
    for name in list(directions):
        tensor = directions.pop(name)
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        result[name] = torch.empty_like(tensor, dtype=dtype)
        targets = _in_columns(_flat(result[name]), width)
        for part, target in zip(_in_columns(_flat(tensor), width), targets, strict=True):
            target.copy_(mixed(factors, part.double()))
    return result


def _flat(directions: Tensor) -> Tensor:
    """Return the directions of a tensor as rows."""
    return directions.reshape(len(directions), -1)


def _in_columns(tensor: Tensor, width: int) -> Iterator[Tensor]:
    """Yield views of a matrix with at most `width` columns each."""
    for start in range(0, tensor.shape[1], width):
        yield tensor[:, start : start + width]


def orthonormal_factors(
    blocks: Callable[[], Iterable[Tensor]], numbers: Sequence[int]
) -> list[Tensor]:
    """Return lower triangular matrices (k, k) in float64 that orthonormalise the rows of B.

    `mixed` applies them to the same blocks.

    Args:
        blocks: returns, on each call, the columns of B in blocks (k, width) in float64.
        numbers: indices of the k directions, for error messages.

    Raises:
        InputError: if a row of B is 0 or a combination of those before it.
    """
    factors: list[Tensor] = []
    for _ in range(2):  # the second pass removes the rounding errors of the first
        products = torch.zeros(len(numbers), len(numbers), dtype=torch.float64)
        for block in blocks():
            rows = mixed(factors, block)
            products += (rows @ rows.T).cpu()
        factors.append(torch.from_numpy(_inverse_factor(products.numpy(), numbers)))
    return factors


def mixed(factors: Sequence[Tensor], block: Tensor) -> Tensor:
    """Multiply a block by each factor in turn; multiplying by their product would round more.

    Args:
        factors: matrices (k, k), as from `orthonormal_factors`.
        block: columns of all directions, (k, width), float64.
    """
    for factor in factors:
        block = factor.to(block.device) @ block
    return block


def _inverse_factor(products: NDArray[np.float64], numbers: Sequence[int]) -> NDArray[np.float64]:
    """Return the inverse of the Cholesky factor of a matrix of inner products.

    Raises:
        InputError: if a direction is 0 or a combination of those before it.
    """
    lengths = np.sqrt(np.diag(products))
    for index, length in enumerate(lengths):
        if not length > 0:
            raise InputError(
                f"direction {numbers[index]} (counted from 0) is 0. Leave it out of the file."
            )
    cosines = products / np.outer(lengths, lengths)
    inverse = np.zeros_like(cosines)
    for index in range(len(lengths)):
        before = inverse[:index, :index]
        along = before @ cosines[:index, index]
        outside = cosines[index, index] - along @ along
        if outside < _LEAST_OUTSIDE:
            raise InputError(
                f"direction {numbers[index]} (counted from 0) is a combination of those before it, "
                "as far as float32 can tell. Leave it out of the file."
            )
        inverse[index, :index] = -(along @ before) / math.sqrt(outside)
        inverse[index, index] = 1 / math.sqrt(outside)
    scaled: NDArray[np.float64] = inverse / lengths
    return scaled
