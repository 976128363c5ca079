"""Define the kinds of failure that callers handle separately, each with its exit code for the
command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NotRequired, TypedDict


class LCAError(Exception):
    """Base class of every error this package raises on purpose.

    The message is one line that says what was asked, what was found and what to do.
    """

    exit_code = 1


class InputError(LCAError):
    """Report wrong usage, checkpoints, names, shapes or task, before the first evaluation."""

    exit_code = 2


class SpanError(LCAError):
    """Report that some spans could not be replayed.

    The other spans are complete; running the same command again retries the failed ones.
    """

    exit_code = 3


class NotFiniteError(SpanError):
    """Report a checkpoint that holds NaN or Inf.

    Retrying does not help: no span that touches this checkpoint can be replayed.

    Args:
        message: what was found, and where.
        step: the training step of the checkpoint.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class DamageError(LCAError):
    """Report stored results that differ from what was committed; `lca repair` recomputes them."""

    exit_code = 4


class ResourceError(LCAError):
    """Report something the environment lacks, such as a worker, a GPU, disk space or a lock that
    another process holds.
    """

    exit_code = 5


class Interrupted(LCAError, KeyboardInterrupt):
    """Report a stop on request, after the spans in flight finished; running again resumes.

    Both `except LCAError` and `except KeyboardInterrupt` catch it.
    """

    exit_code = 130


class LCAWarning(UserWarning):
    """Warn the caller while work continues; filter it like any other Python warning category."""


def few(words: Sequence[str], most: int = 3) -> str:
    """Join the first few words and count the rest.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'

    Args:
        words: all words, in order.
        most: how many words to list before counting the rest.
    """
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def optional_package(package: str, what: str) -> ModuleType:
    """Import a package that this one does not install.

    Args:
        package: dotted name of the module to import.
        what: the feature that needs it, as the subject of the error message.

    Raises:
        ResourceError: if the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ResourceError(
            f"{what} needs the package {name}, which is not installed. Try: pip install {name}"
        ) from None


def amount(count: float) -> str:
    """Format a number of bytes for people.

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
    """An error as plain strings and numbers; see `pack_error`."""

    kind: str
    message: str
    step: NotRequired[int]


def pack_error(error: LCAError) -> PackedError:
    """Convert an error to plain strings and numbers, so that another process need not unpickle an
    exception class.

    >>> unpack_error(pack_error(InputError("no such loss")))
    InputError('no such loss')
    """
    packed: PackedError = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, NotFiniteError):
        packed["step"] = error.step
    return packed


def unpack_error(packed: PackedError) -> LCAError:
    """Rebuild the error from the result of `pack_error`."""
    if "step" in packed:
        return NotFiniteError(packed["message"], packed["step"])
    return _KINDS[packed["kind"]](packed["message"])
