"""Write a series as safetensors files, each atomically, and continue where an earlier import
stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from ..base.locks import DirectoryLock
from ..base.text import count
from ..checkpoints.headers import HALF, TensorHeader, read_header
from ..checkpoints.layouts import MOMENTS
from ..checkpoints.optimizer_steps import METADATA_KEY, moments_path
from ..checkpoints.paths import here
from ..checkpoints.places import STEP, Place, place_of
from ..checkpoints.recorded import name_of, step_of
from ..checkpoints.steps import parse_steps
from ..checkpoints.trajectory import TensorSpec, open_trajectory
from ..errors import InputError, ResourceError, amount
from ..recording.staging import Layout
from ..tasks.task import Task
from .formats import FORMATS
from .pytorch import open_place
from .series import SIZES, Iterate, Progress, Series, Tensors, headers_of

Say = Callable[[str], None]

_PARTIAL = ".import"
# The only entry of the metadata: safetensors writes several in no fixed order, and a run identifies
# checkpoints by their bytes. This module lays out files that need a second entry, the record.
_SOURCE = "source"


@dataclass(frozen=True)
class Imported:
    """Report the outcome of an import.

    Attributes:
        steps: steps of the series.
        written: number of iterates written.
        present: number of iterates that existed before.
        bytes: number of bytes written.
    """

    steps: list[int]
    written: int
    present: int
    bytes: int


def convert(
    source: str | Path,
    directory: str | Path,
    *,
    key: str | None = None,
    pattern: str | None = None,
    steps: str | None = None,
    dataset: str | None = None,
    task: str | Path | Task | None = None,
    say: Say = print,
    progress: Progress = lambda what, done, total: None,
) -> Imported:
    """Write the checkpoints of `source` as `step_*.safetensors` files, each atomically.

    Files of an earlier import stay unchanged, so the same call continues after an interruption and
    adds new checkpoints.

    Args:
        source: a directory of checkpoints, a template with `{step}`, or a file that holds a series.
        directory: directory for the series, created if missing; it must hold nothing else.
        key: entry of each checkpoint that is the state dict, if that is not clear; a dotted path
            for a nested one.
        pattern: regular expression with a group `step`, searched for in each name; names that do
            not match are skipped.
        steps: steps to import from a template with `{step}`, as for `open_trajectory`.
        dataset: for an HDF5 file, the dataset with a row for every iterate (default `all_weights`).
        task: for an HDF5 file, the task whose model gives order and shapes of the parameters.
        say: called with each note.
        progress: called as `progress(what, done, total)`.

    Raises:
        InputError: if the source or the present contents of the directory are wrong, before
            anything is written; also if a checkpoint is damaged inside or changes meanwhile.
        ResourceError: if disk space or a package is missing, or a file cannot be written.
    """
    what = "an import reads and writes file systems. Copy the checkpoints here first."
    named = place_of(source)
    origin, place = here(named.root, what), here(directory, what)
    options = {"key": key, "pattern": pattern, "dataset": dataset, "task": task}
    set_options = {name: value for name, value in options.items() if value is not None}
    try:
        _only_steps(place)
        series = (
            _of_place(named, steps, set_options, progress)
            if named.rest
            else _opened(origin, _without_steps(set_options, steps), progress)
        )
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename or origin}: {error.strerror}. Check the path and its "
            "permissions."
        ) from None
    if len(series.iterates) < 2:
        count = "only one checkpoint" if series.iterates else "no checkpoint"
        which = f" whose name --pattern {pattern!r} matches" if pattern else ""
        raise InputError(
            f"{named} holds {count}{which}; at least two are needed, because a segment runs from "
            "one to the next."
        )
    for note in [*series.notes, *_half(series)]:
        say(note)
    with _alone(place):
        waiting = _waiting(place, series)
        _room(place, series, waiting)
        written = 0
        for done, iterate in enumerate(waiting):
            progress("writing", done, len(waiting))
            written += _write(place, iterate, series.tensors)
        progress("writing", len(waiting), len(waiting))
    for note in open_trajectory(place).notes:
        say(note)
    numbers = [iterate.step for iterate in series.iterates]
    return Imported(numbers, len(waiting), len(numbers) - len(waiting), written)


def _without_steps(options: Mapping[str, object], steps: str | None) -> Mapping[str, object]:
    """Return the options if there are no steps.

    Raises:
        InputError: if there are, because only a template with `{step}` takes them.
    """
    if steps is not None:
        raise InputError(
            f"--steps of an import needs a path with {STEP} in it, such as "
            f"'ROOT/step{STEP}/pytorch_model.bin'. Leave it out; `lca run --steps` chooses among the "
            "imported steps."
        )
    return options


def _of_place(
    place: Place, steps: str | None, options: Mapping[str, object], progress: Progress
) -> Series:
    """Open the checkpoints of a template with `{step}`.

    Raises:
        InputError: if an option does not apply to a template.
    """
    for option in options:
        if option != "key":
            raise InputError(
                f"--{option} does not apply to {place}, where {STEP} stands for the step. Leave it "
                "out."
            )
    key = options.get("key")
    wanted = parse_steps(":" if steps is None else steps)
    return open_place(place, wanted, progress, None if key is None else str(key))


def _opened(origin: Path, options: Mapping[str, object], progress: Progress) -> Series:
    if not origin.exists():
        raise InputError(
            f"{origin} does not exist. Give the directory, or the file, that holds the checkpoints."
        )
    for kind in FORMATS:
        if kind.recognises(origin):
            for option in options:
                if kind.options and option not in kind.options:
                    raise InputError(
                        f"--{option} does not apply to {origin}, which holds {kind.name}. Leave it "
                        "out."
                    )
            return kind.open(origin, progress, **options)
    raise InputError(
        f"{origin} holds no checkpoints of a format that can be imported: "
        f"{', '.join(kind.name for kind in FORMATS if kind.options)}."
    )


def _half(series: Series) -> list[str]:
    narrow = [name for name, header in series.tensors.items() if header.dtype in HALF]
    return [
        f"{len(narrow)} of {count(len(series.tensors), 'tensor')} "
        f"{'is' if len(narrow) == 1 else 'are'} stored in half precision, which rounds most steps "
        "of training away; `lca run` says how many. Save float32 weights if you can"
    ] * bool(narrow)


def _only_steps(place: Path) -> None:
    """Check that a directory holds only what an import writes.

    Raises:
        InputError: if it holds something else, or is not a directory.
    """
    if not place.is_dir():
        if os.path.lexists(place):
            raise InputError(f"{place} exists and is not a directory. Name another one.")
        return
    foreign = sorted(
        path.name
        for path in [*place.iterdir(), *(place / MOMENTS).glob("*")]
        if path.name not in (_PARTIAL, MOMENTS) and step_of(path.name) is None
    )
    if foreign:
        raise InputError(
            f"{place} is not empty: it holds {foreign[0]!r}, which no import wrote. Name a new "
            "directory."
        )


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Lock the directory; remove files that this or an earlier import left unfinished.

    Raises:
        ResourceError: if another import holds the lock.
        InputError: if the directory cannot be created or opened.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock(place)
    except BlockingIOError:
        raise ResourceError(
            f"another import writes into {place}. Wait for it, or name another directory."
        ) from None
    except OSError as error:
        raise InputError(
            f"{place} cannot be created or opened: {error.strerror}. Name another directory."
        ) from None
    shutil.rmtree(place / _PARTIAL, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(place / _PARTIAL, ignore_errors=True)
        lock.release()


def _waiting(place: Path, series: Series) -> list[Iterate]:
    """Return the iterates whose file, or file of moments, does not exist yet.

    Raises:
        InputError: if an existing file does not belong to this series.
    """
    present = {path.name for path in place.iterdir() if path.name not in (_PARTIAL, MOMENTS)}
    moments = {path.name for path in (place / MOMENTS).glob("*")}
    with_moments = {name_of(it.step) for it in series.iterates if it.beside.moments is not None}
    extra = sorted(present - {name_of(iterate.step) for iterate in series.iterates})
    extra += sorted(f"{MOMENTS}/{name}" for name in moments - with_moments)
    if extra:
        raise InputError(
            f"{place} holds {extra[0]}, a step that is not in this series. Name a new directory."
        )
    waiting = []
    for iterate in series.iterates:
        path, beside = place / name_of(iterate.step), moments_path(place, iterate.step)
        if path.name in present:
            header = read_header(path)
            if header.tensors != series.tensors:
                raise InputError(_of_another(path, iterate))
            _compare_source(path, _identity(iterate), iterate)
        if beside.name in moments:
            _compare_source(beside, _identity_of_moments(iterate), iterate)
        if path.name not in present or beside.name in with_moments - moments:
            waiting.append(iterate)
    return waiting


def _identity(iterate: Iterate) -> str:
    """Return a checksum of what an iterate's file is made from."""
    own, beside = iterate.identity(), iterate.beside
    return own if beside.record is None else f"{own}-{beside.identity}"


def _identity_of_moments(iterate: Iterate) -> str:
    return f"{iterate.identity()}-{iterate.beside.identity}"


def _compare_source(path: Path, identity: str, iterate: Iterate) -> None:
    if read_header(path).metadata.get(_SOURCE) != identity:
        raise InputError(_of_another(path, iterate))


def _of_another(path: Path, iterate: Iterate) -> str:
    return (
        f"{path} already exists and was not imported from the present {iterate.origin}. Name a "
        "new directory, or move the file away."
    )


def _room(place: Path, series: Series, waiting: Sequence[Iterate]) -> None:
    size = sum(
        len(name.encode())
        + 100
        + SIZES[header.dtype] * TensorSpec(name, "state", header.shape).elements
        for name, header in series.tensors.items()
    )
    beside = sum(iterate.beside.bytes + len(iterate.beside.record or "") for iterate in waiting)
    free, files = shutil.disk_usage(place).free, len(waiting)
    if files * size + beside > free:
        of_optimizer = f" and {amount(beside)} of the optimiser" if beside else ""
        raise ResourceError(
            f"{files:,} files of {amount(size)}{of_optimizer} take "
            f"{amount(files * size + beside)}, and {amount(free)} are free at {place}. Free some, "
            "or name another directory."
        )


def _write(place: Path, iterate: Iterate, known: Mapping[str, TensorHeader]) -> int:
    """Write the moments and then the tensors of one iterate, and return the size of both in bytes.

    Raises:
        InputError: if the source changed meanwhile.
    """
    size = 0
    if iterate.beside.moments is not None:
        path = moments_path(place, iterate.step)
        path.parent.mkdir(exist_ok=True)
        moments, source = iterate.beside.moments(), {_SOURCE: _identity_of_moments(iterate)}
        size += _put(place, path, lambda temporary: save_file(moments, temporary, metadata=source))
    tensors, identity = iterate.read(), _identity(iterate)
    if headers_of(tensors) != known:
        raise InputError(
            f"{iterate.origin} changed while it was imported. Run again when nothing writes there."
        )
    metadata, record = {_SOURCE: identity}, iterate.beside.record
    return size + _put(
        place,
        place / name_of(iterate.step),
        lambda temporary: (
            save_file(tensors, temporary, metadata=metadata)
            if record is None
            else _save_recorded(
                tensors, temporary, iterate.step, {**metadata, METADATA_KEY: record}
            )
        ),
    )


def _save_recorded(tensors: Tensors, path: Path, step: int, metadata: Mapping[str, str]) -> None:
    """Write a file with several entries of metadata in a fixed order, as a recorder does."""
    layout = Layout(tensors)
    with path.open("wb") as file:
        file.write(layout.header(step, metadata))
        for name in layout.places:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def _put(place: Path, path: Path, save: Callable[[Path], None]) -> int:
    """Write a file under a temporary name, rename it, and return its size in bytes.

    Raises:
        ResourceError: if it cannot be written.
    """
    temporary = place / _PARTIAL / path.name
    umask = os.umask(0)
    os.umask(umask)
    try:
        temporary.parent.mkdir(exist_ok=True)
        save(temporary)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        )
        raise ResourceError(
            f"{path} cannot be written: {'no space left' if full else error}. Existing files are "
            "complete; fix the problem and run the same command again to continue."
        ) from error
    return size
