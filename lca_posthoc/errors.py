"""The few kinds of failure a caller tells apart; each carries the exit code of the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NotRequired, TypedDict


class LCAError(Exception):
    """Anything this package reports on purpose: one line that says what was asked, what was found,
    what to do.
    """

    exit_code = 1


class InputError(LCAError):
    """Wrong usage, checkpoints, names, shapes or task, found before the first evaluation."""

    exit_code = 2


class SpanError(LCAError):
    """Some spans could not be replayed; the others are complete, and running again tries these once
    more.
    """

    exit_code = 3


class NotFiniteError(SpanError):
    """A checkpoint holds NaN or Inf: the spans that touch it cannot be replayed, however often they
    are tried.

    Args:
        message: what was found, and where.
        step: the training step of the checkpoint.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class DamageError(LCAError):
    """Stored results are not what was committed; `lca repair` computes them again."""

    exit_code = 4


class ResourceError(LCAError):
    """The environment lacks something: a worker, a GPU, disk space, a lock somebody else holds."""

    exit_code = 5


class Interrupted(LCAError, KeyboardInterrupt):
    """Stopped on request after the spans in flight were drained; running again resumes.

    Both `except LCAError` and `except KeyboardInterrupt` catch it.
    """

    exit_code = 130


class LCAWarning(UserWarning):
    """Something the caller should know while work goes on; filter it like any category of Python's
    warnings.
    """


def few(words: Sequence[str], most: int = 3) -> str:
    """Return the first of some words, and how many more there are.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def optional_package(package: str, what: str) -> ModuleType:
    """Return a package that is not installed with this one; `what` says in the error what needs it.

    Raises:
        ResourceError: where the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ResourceError(
            f"{what} needs the package {name}, which is not installed. Try: pip install {name}"
        ) from None


def amount(count: float) -> str:
    """Return a number of bytes as people read it.

    >>> amount(1234567)
    '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


_KINDS = {
    kind.__name__: kind
    for kind in (LCAError, InputError, SpanError, DamageError, ResourceError, Interrupted)
}


class PackedError(TypedDict):
    """An error as plain strings and numbers, see `pack_error`."""

    kind: str
    message: str
    step: NotRequired[int]


def pack_error(error: LCAError) -> PackedError:
    """Return the error as plain strings and numbers, so that no exception class has to be unpickled
    in another process.

    >>> unpack_error(pack_error(InputError("no such loss")))
    InputError('no such loss')
    """
    packed: PackedError = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, NotFiniteError):
        packed["step"] = error.step
    return packed


def unpack_error(packed: PackedError) -> LCAError:
    """Return the error that `pack_error` packed."""
    if "step" in packed:
        return NotFiniteError(packed["message"], packed["step"])
    return _KINDS[packed["kind"]](packed["message"])
