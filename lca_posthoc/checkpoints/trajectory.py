"""Find, order, validate and read the checkpoints of one training run.

Opening reads headers only; reading never maps a file into memory. The model's tensors are given as
a table: nothing here knows of tasks, losses or runs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, NotFiniteError, SpanError, few
from .headers import HALF, Header, TensorHeader, read_header
from .layouts import (
    IMPORTED,
    MOMENTS,
    both_count,
    count_epochs,
    epochs_are_meant,
    refuse_counted_saves,
    refuse_epochs,
    refuse_unreadable,
    says_step,
    several_namings,
    states_epoch,
)
from .layouts import step_in_name as step_in_name
from .leftovers import is_known
from .paths import is_remote, located, reached
from .spacing import StillSegments, every_of, long_segments

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_INDEX = "model.safetensors.index.json"
RESERVED = ("step", "group")  # dimensions of results, beside the names of allocated tensors
_WRAPPERS = frozenset(
    (
        # torch: compile, checkpoint_wrapper, FSDP
        *(
            "_orig_mod",
            "_checkpoint_wrapped_module",
            "_fsdp_wrapped_module",
        ),
        *("_forward_module", "_fpw_module"),  # Lightning's Fabric and its strategies; fairscale
    )
)
# DataParallel, DeepSpeed, AveragedModel; Opacus. Inside, models call their own parts so
_OUTERMOST = (
    "module",
    "_module",
)
_AT_A_TIME = 16


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model: its first name, its other names when tied, and how it takes part.

    `kind` is "parameter", "buffer" or "state" (loaded, never allocated); `unit_axis` is the axis
    along which neurons or channels run, None for scalars.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    unit_axis: int | None = None

    @property
    def elements(self) -> int:
        """Return how many numbers the tensor holds."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def units(self) -> int:
        """Return how many neurons or channels the tensor has."""
        return 1 if self.unit_axis is None else self.shape[self.unit_axis]


@dataclass(frozen=True)
class Checkpoint:
    """The files of one training step, their total size in bytes and a CRC32C of samples of them."""

    step: int
    files: tuple[Path, ...]
    size: int
    fingerprint: int


@dataclass(frozen=True)
class Trajectory:
    """All checkpoints in order of their step, with the tensors every one of them holds.

    `gone` are the steps of those whose files a replay removed once it needed them no more.
    """

    root: Path
    checkpoints: tuple[Checkpoint, ...]
    tensors: dict[str, TensorHeader]
    sources: dict[str, str]
    notes: tuple[str, ...]
    gone: frozenset[int] = frozenset()

    @property
    def first_there(self) -> int:
        """Return the position of the first checkpoint whose files are there."""
        return next(
            index
            for index, checkpoint in enumerate(self.checkpoints)
            if checkpoint.step not in self.gone
        )

    @property
    def steps(self) -> list[int]:
        """Return the training steps, ascending."""
        return [checkpoint.step for checkpoint in self.checkpoints]

    @property
    def half_precision(self) -> list[str]:
        """Return tensors stored with fewer than 32 bits a number, in which most of the motion is
        lost.
        """
        return [name for name, header in self.tensors.items() if header.dtype in HALF]

    def sources_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return a dict from names of the model's tensors to their names inside the files, for
        those the files hold.
        """
        return {
            name: self.sources[normalise(name)] for name in names if normalise(name) in self.sources
        }

    def match(
        self,
        table: Sequence[TensorSpec],
        fixed: Iterable[str] = (),
        patterns: Sequence[str] = (),
        unstored: Collection[str] = (),
    ) -> dict[str, str]:
        """Return the name inside the files of every tensor of the table; files may hold those that
        are `fixed` too, which are not read.

        Args:
            table: the model's tensors.
            fixed: the model's tensors that `Task.fixed` names.
            patterns: of `Task.fixed`.
            unstored: the model's buffers that are not saved.

        Raises:
            InputError: where a tensor is missing, of another shape, or reserved by name; or left
                over, and not one of `leftovers`.
        """
        _refuse_reserved([spec.name for spec in table if spec.kind != "state"])
        names, used = {}, set()
        for spec in table:
            present = [
                name for name in map(normalise, (spec.name, *spec.aliases)) if name in self.tensors
            ]
            if not present:
                raise InputError(self._missing(spec, table))
            header = self.tensors[present[0]]
            if header.shape != spec.shape:
                raise InputError(
                    f"tensor {spec.name!r} has shape {list(header.shape)} in "
                    f"{self.checkpoints[0].files[0]} (step {self.steps[0]}) but {list(spec.shape)} "
                    "in the task's model. Build the model that was trained."
                )
            names[spec.name] = self.sources[present[0]]
            used.update(present)
        used.update(map(normalise, fixed))
        extra = sorted(
            set(self.tensors) - used - set(self.leftovers(table, fixed, patterns, unstored))
        )
        if extra:
            raise InputError(self._left_over(extra))
        return names

    def _left_over(self, extra: list[str]) -> str:
        """Return the message that refuses tensors the task's model does not have."""
        pronoun = "it" if len(extra) == 1 else "them"
        return (
            f"{_some(extra)} stand{'s' if len(extra) == 1 else ''} in "
            f"{self.checkpoints[0].files[0]} (step {self.steps[0]}) but not in the task's model. "
            "Build the model that was trained, or map the names with --rename OLD=NEW. Where the "
            f"model computes the same without {pronoun}, leave {pronoun} out: "
            f"{drop_options(extra, set(self.tensors) - set(extra))}"
        )

    def leftovers(
        self,
        table: Sequence[TensorSpec],
        fixed: Iterable[str] = (),
        patterns: Sequence[str] = (),
        unstored: Collection[str] = (),
    ) -> dict[str, str]:
        """Return tensors that the files hold and the model does not save, with their names inside
        the files; they may be left out.

        They are those `Task.fixed` names, the model's own buffers that are not saved, and buffers
        that older releases of libraries are known to have saved. The caller must check in the files
        that they are what they seem to be. Arguments as for `match`.
        """
        used = {normalise(name) for spec in table for name in (spec.name, *spec.aliases)} | set(
            map(normalise, fixed)
        )
        own = set(map(normalise, unstored))
        return {
            name: self.sources[name]
            for name, header in sorted(self.tensors.items())
            if name not in used
            and (
                name in own
                or any(fnmatchcase(name, pattern) for pattern in patterns)
                or is_known(name, header, used & set(self.tensors))
            )
        }

    def ties(self, table: Sequence[TensorSpec]) -> dict[str, list[str]]:
        """Return tied tensors the files hold under several names: the model's name → the names
        inside the files.
        """
        ties = {}
        for spec in table:
            present = dict.fromkeys(map(normalise, (spec.name, *spec.aliases)))
            sources = [self.sources[name] for name in present if name in self.sources]
            if len(sources) > 1:
                ties[spec.name] = sources
        return ties

    def _missing(self, spec: TensorSpec, table: Sequence[TensorSpec]) -> str:
        known = {normalise(name) for other in table for name in (other.name, *other.aliases)}
        unused = sorted(set(self.tensors) - known)
        hint = f"; the file has {_some(unused)} instead" if unused else ""
        return (
            f"tensor {spec.name!r} of the task's model (shape {list(spec.shape)}) is missing in "
            f"{self.checkpoints[0].files[0]} (step {self.steps[0]}){hint}. Build the model that "
            "was trained, or map the names with --rename OLD=NEW. What never moves and is not "
            "stored is frozen in the model, or named in Task(fixed=[…])."
        )


def drop_options(names: Collection[str], others: Collection[str] = ()) -> str:
    """Return the `--rename` options that leave tensors out, written for a shell; one option stands
    for names that differ in a number only.

    A number stays as it is where the shared option would hit a tensor of `others`.

    >>> drop_options(["h.0.attn.bias", "h.11.attn.bias"], ["h.0.attn.weight"])
    "--rename '^h\\\\.\\\\d+\\\\.attn\\\\.bias$='"
    """
    rules: dict[str, None] = {}
    for name in sorted(names):
        exact = rf"^{re.escape(name)}$".replace("=", r"\x3d")
        joined = re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", exact)
        hits = [other for other in others if re.search(joined, other)]
        rules[exact if hits else joined] = None
    return " ".join(f"--rename {shlex.quote(rule + '=')}" for rule in rules)


def _some(names: Sequence[str]) -> str:
    return ("tensor " if len(names) == 1 else "tensors ") + few([*map(repr, names)])


def is_statistic(name: str) -> bool:
    """Tell whether a tensor is a normalisation layer's running mean or variance, by the name torch
    gives it.
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def normalise(name: str) -> str:
    """Return a tensor's name without what wrappers around the model or its parts put into it.

    >>> normalise("module._orig_mod.fc._checkpoint_wrapped_module.weight")
    'fc.weight'
    """
    *path, last = name.split(".")
    path = [part for part in path if part not in _WRAPPERS]
    while path and path[0] in _OUTERMOST:
        path = path[1:]
    return ".".join([*path, last])


def reserved(names: Sequence[str]) -> list[str]:
    """Return those names of allocated tensors that results use for a dimension.

    >>> reserved(["step", "fc.step", "fc", "fc:0"])
    ['step', 'fc:0']
    """
    dimensions = {*RESERVED, "total", *(f"{name}:unit" for name in names)}
    return [
        name
        for name in names
        if name in dimensions
        or (name.rpartition(":")[0] in names and name.rpartition(":")[2].isdigit())
    ]


def open_trajectory(
    directory: str | Path,
    *,
    pattern: str | None = None,
    rename: Sequence[str] = (),
    steps: str | None = None,
    consumed: Sequence[Checkpoint] = (),
) -> Trajectory:
    """Open a directory of safetensors iterates: files, `checkpoint-N/` directories, or sharded ones
    with an index.

    Args:
        directory: where the checkpoints lie; a URL of fsspec's, such as `s3://…`, is read through
            its driver.
        pattern: a regular expression with a group `step`, matched against each name; names it does
            not match are left out.
        rename: `OLD=NEW` pairs, OLD a regular expression, applied to every tensor name in turn; a
            tensor whose whole name becomes empty is left out.
        steps: `A:B` or `A:B:K`, training steps with both ends included, every K-th checkpoint of
            them.
        consumed: checkpoints that belong to the trajectory though their files may be removed.

    Raises:
        InputError: naming the file and the step, what was found, and what to do.
    """
    root = located(directory)
    _require_directory(root)
    rules = [_rename_rule(text) for text in rename]
    regex = compile_pattern(pattern) if pattern else None
    headers = _Headers()
    try:
        with reached(root):
            entries, notes = _discover(root, regex, headers)
            named = sorted((entry.step, entry.files) for entry in entries)
            chosen, thinning = _select(named, steps)
            stored = {step for step, _ in named}
            gone = [checkpoint for checkpoint in consumed if checkpoint.step not in stored]
            if len(chosen) + len(gone) < 2:
                refuse_unreadable(root)
            used = dict(chosen[::thinning])
            notes += _counted(
                root, [entry for entry in entries if entry.step in used], regex, headers
            )
    except OSError as error:
        raise InputError(f"cannot look into {root}: {error.strerror}.") from None
    if not used or len(used) + len(gone) < 2:
        which = (f" among steps {steps}" if steps else "") + (
            f" whose name --pattern {pattern!r} matches" if pattern else ""
        )
        raise _too_few(root, [step for step, _ in chosen], which)
    opened = _validated(root, chosen, thinning, rules, notes, headers, bool(gone))
    return replace(
        opened,
        checkpoints=tuple(sorted((*gone, *opened.checkpoints), key=lambda one: one.step)),
        gone=frozenset(checkpoint.step for checkpoint in gone),
    )


def extended(
    trajectory: Trajectory, files: Mapping[int, Path], rename: Sequence[str] = ()
) -> Trajectory:
    """Return a trajectory with checkpoints that came since, of one file each.

    Args:
        trajectory: as it was.
        files: of later steps, by step.
        rename: as for `open_trajectory`.

    Raises:
        InputError: where one holds other tensors, or cannot be read.
    """
    rules = [_rename_rule(text) for text in rename]
    known = {source: trajectory.tensors[name] for name, source in trajectory.sources.items()}
    more = []
    for step, path in sorted(files.items()):
        header = read_header(path)
        stored = header.tensors
        if stored.keys() != known.keys():
            names = _names(stored, rules, path, {})
            stored = {source: stored[source] for source in names.values()}
        if stored != known:
            raise InputError(_difference(stored, known, step, path))
        more.append(Checkpoint(step, (path,), header.size, _joined([header])))
    return replace(trajectory, checkpoints=(*trajectory.checkpoints, *more))


def _require_directory(root: Path) -> None:
    try:
        with reached(root):
            is_there = root.is_dir()
    except OSError as error:
        raise InputError(f"cannot look into {root}: {error.strerror}.") from None
    if not is_there:
        if not is_remote(root) and root.is_file():
            refuse_unreadable(root)
        raise InputError(
            f"{root} is not a directory of checkpoints. Give the directory that holds the saved "
            "iterates."
        )


def _too_few(root: Path, steps: list[int], which: str) -> InputError:
    """Return the error for fewer than two checkpoints, of those that `which` tells."""
    only = f"only one checkpoint (step {steps[0]})" if steps else "no checkpoint"
    return InputError(
        f"{root} holds {only}{which}; at least two are needed, for a segment runs from one to the "
        "next. Expected files such as step_00000010.safetensors or "
        f"checkpoint-10/model.safetensors.{_importable(root)}"
    )


def _importable(root: Path) -> str:
    """Return a hint where the directory holds checkpoints of another format, else ""."""
    files = [path for path in root.iterdir() if path.suffix in IMPORTED]
    kinds = ", ".join(sorted({path.suffix for path in files}))
    return (
        f" It holds {len(files)} files of {kinds}: `lca import {root} DIR` makes a directory of "
        "them that does."
        if files
        else ""
    )


class _Headers(dict[Path, Header]):
    """The headers of files, read at most once: for the step a file states, then for its tensors."""

    def __missing__(self, path: Path) -> Header:
        self[path] = read_header(path)
        return self[path]

    def fetch(self, paths: Sequence[Path]) -> None:
        """Read many at a time."""
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            for _ in pool.map(self.__getitem__, paths):
                pass

    def pop(self, path: Path) -> Header:  # type: ignore[override]
        """Return a header and forget it."""
        header = self[path]
        del self[path]
        return header


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the argument of `--pattern` as a regular expression, which must have a group `step`.

    Raises:
        InputError: where it is no regular expression, or has no such group.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--pattern {pattern!r} is not a regular expression: {error}.") from None
    if "step" not in regex.groupindex:
        raise InputError(
            f"--pattern {pattern!r} has no group called step. Write the number as (?P<step>\\d+)."
        )
    return regex


def _refuse_reserved(names: list[str]) -> None:
    """Refuse names that results have for a dimension."""
    for name in reserved(names):
        raise InputError(
            f"the model has a tensor called {name!r}, a name that results have for a dimension. "
            "Rename it in the task's model, to NEW perhaps, and in the checkpoints with --rename "
            f"'^{re.escape(name)}$=NEW'."
        )


def _rename_rule(text: str) -> tuple[re.Pattern[str], str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise InputError(
            f"--rename {text!r} is not OLD=NEW. For example: --rename '^backbone\\.=encoder.'"
        )
    try:
        return re.compile(old), new
    except re.error as error:
        raise InputError(
            f"--rename {text!r}: {old!r} is not a regular expression: {error}."
        ) from None


@dataclass(frozen=True)
class _Entry:
    """One checkpoint of a directory: its step, its files, and whether the name alone tells the
    step.
    """

    path: Path
    step: int
    files: tuple[Path, ...]
    by_name: bool


def _discover(
    root: Path, regex: re.Pattern[str] | None, headers: _Headers
) -> tuple[list[_Entry], list[str]]:
    """Return the checkpoints of a directory, one for each step, and notes on what is left out."""
    named: dict[int, _Entry] = {}
    unnamed: list[Path] = []
    for path, files in _listed(root, headers):
        if not files:
            continue
        step, by_name = _step(path, files == (path,), regex, headers)
        if step is None:
            unnamed.append(path)
        elif step in named:
            raise InputError(
                f"{named[step].files[0]} and {files[0]} both claim step {step}. Remove one, or "
                "tell steps apart with --pattern."
            )
        else:
            named[step] = _Entry(path, step, files, by_name)
    if regex is not None:
        return [*named.values()], []
    final = [
        path for path in unnamed if named and (path.stem == "model" or _SHARD.search(path.stem))
    ]
    _refuse_without_step([path for path in unnamed if path not in final])
    return [*named.values()], [f"left out {path.name}: it states no step" for path in final]


def _listed(root: Path, headers: _Headers) -> list[tuple[Path, tuple[Path, ...]]]:
    """Return the entries of a directory in order, each with its safetensors files."""
    entries = sorted(root.iterdir())
    # from far away each takes a while
    with ThreadPoolExecutor(_AT_A_TIME if is_remote(root) else 1) as pool:
        entries_files = list(zip(entries, pool.map(_files, entries), strict=True))
    if is_remote(root):
        headers.fetch([file for _, files in entries_files for file in files])
    return entries_files


def _refuse_without_step(lost: list[Path]) -> None:
    """Refuse checkpoints whose step nothing tells."""
    if any(states_epoch(path.name) for path in lost):
        refuse_epochs(dict.fromkeys([path.name for path in lost if states_epoch(path.name)]))
    if lost:
        raise InputError(
            "cannot tell the training step of "
            f"{', '.join(str(path) for path in lost[:3])}{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}. "
            "Name the number with --pattern, for example --pattern 'run_(?P<step>\\d+)'."
        )


def _counted(
    root: Path, entries: Sequence[_Entry], regex: re.Pattern[str] | None, headers: _Headers
) -> list[str]:
    """Refuse numbers in names that count epochs or saves; return notes where the user asked for
    them, or where names leave it open.
    """
    by_name = [entry for entry in entries if entry.by_name]
    if not by_name:
        return []
    epochs = {entry: _epoch_of(headers[entry.files[0]]) for entry in by_name}
    counts = count_epochs(
        [(entry.step, epoch) for entry, epoch in epochs.items() if epoch is not None]
    )
    if regex is not None:
        return [epochs_are_meant(regex.pattern)] if counts else []
    if not is_remote(root):
        refuse_counted_saves([entry.path for entry in by_name if entry.path.is_dir()])
    notes = several_namings([entry.path.name for entry in by_name])
    if counts:
        if not all(says_step(entry.path.name) for entry in by_name):
            refuse_epochs({entry.path.name: epoch for entry, epoch in epochs.items()})
        notes.append(both_count([entry.path.name for entry in by_name]))
    return notes


def _epoch_of(header: Header) -> int | None:
    """Return the epoch a file's metadata states; None where it states none."""
    stated = header.metadata.get("epoch", "")
    return int(stated) if re.fullmatch("[0-9]{1,18}", stated) else None


def _files(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files of one entry of the directory; an empty tuple where it is not a
    checkpoint.
    """
    if path.name.startswith(".") or ".tmp" in path.name:
        return ()
    # over HTTP, asking whether it is a file would download it
    if path.suffix == ".safetensors" and is_remote(path):
        return (path,)
    if path.is_dir():
        if path.name == MOMENTS:
            return ()
        if (path / _INDEX).is_file():
            return shards(path / _INDEX)
        inside = [
            file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith(".")
        ]
        single = [file for file in inside if file.name == "model.safetensors"] or inside
        if len(single) > 1 and step_in_name(path.name) is not None:
            raise InputError(
                f"{path} holds {len(single)} safetensors files and no {_INDEX}. Restore the index, "
                "or move the directory away."
            )
        return tuple(single) if len(single) == 1 else ()
    return (
        (path,) if path.suffix == ".safetensors" and (path.is_symlink() or path.is_file()) else ()
    )


def shards(index: Path) -> tuple[Path, ...]:
    """Return the files a shard index names, which lie beside it.

    Raises:
        InputError: where the file is no index, or a file it names is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise InputError(
            f"{index} is not a shard index. It needs a weight_map from tensor to file; save the "
            "checkpoint again."
        ) from None
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{index} is not a shard index. It needs a weight_map from tensor to file; save the "
            "checkpoint again."
        )
    files = tuple(index.parent / Path(name).name for name in names)
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{index} names {file.name}, which is missing. Save the checkpoint again or remove "
                "its directory."
            )
    return files


def _step(
    path: Path, is_file: bool, regex: re.Pattern[str] | None, headers: _Headers
) -> tuple[int | None, bool]:
    """Return the step of an entry, None where it states none, and whether its name alone tells
    it.
    """
    if regex is not None:
        match = regex.search(path.name)
        return (
            int(match["step"]) if match and re.fullmatch("[0-9]{1,18}", match["step"]) else None
        ), True
    stated = headers[path].metadata.get("step") if is_file else trainer_step(path)
    if stated is not None and re.fullmatch("[0-9]{1,18}", stated):
        return int(stated), False
    if stated is not None and is_file:
        raise InputError(
            f"{path} states {stated[:40]!r} as its step in its metadata, which is no training "
            "step. Name steps with --pattern."
        )
    return step_in_name(path.name.removesuffix(".safetensors")), True


def trainer_step(directory: Path) -> str | None:
    """Return the step a trainer wrote beside the weights, as text; None where it wrote none."""
    try:
        return str(json.loads((directory / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _select(
    named: list[tuple[int, tuple[Path, ...]]], steps: str | None
) -> tuple[list[tuple[int, tuple[Path, ...]]], int]:
    """Return the checkpoints within the range of `--steps A:B:K`, and K, 1 where every checkpoint
    of the range is used.
    """
    if steps is None:
        return named, 1
    match = re.fullmatch(r"(\d*):(\d*)(?::(\d+))?", steps)
    if not match or match[3] == "0":
        raise InputError(
            f"--steps {steps!r} is not A:B or A:B:K. For example 0:500, 100:, or ::10 for every "
            "tenth checkpoint."
        )
    first, last = int(match[1] or 0), int(match[2]) if match[2] else None
    within = [item for item in named if item[0] >= first and (last is None or item[0] <= last)]
    return within, int(match[3] or 1)


def _validated(
    root: Path,
    within: list[tuple[int, tuple[Path, ...]]],
    thinning: int,
    rules: list[tuple[re.Pattern[str], str]],
    notes: list[str],
    headers: _Headers,
    has_gaps: bool,
) -> Trajectory:
    checkpoints: list[Checkpoint] = []
    tensors: dict[str, TensorHeader] = {}
    sources: dict[str, str] = {}
    dropped: dict[str, None] = {}
    chosen = within[::thinning]
    still = StillSegments()
    steps = {step for step, _ in chosen}
    intervals = [
        1
        if (header := headers[files[0]] if step in steps else headers.get(files[0])) is None
        else every_of(header)
        for step, files in within
    ]
    for step, files in chosen:
        file_headers = [headers.pop(file) for file in files]
        stored = {
            name: tensor for header in file_headers for name, tensor in header.tensors.items()
        }
        if not checkpoints:
            sources = _names(stored, rules, files[0], dropped)
            tensors = {name: stored[source] for name, source in sources.items()}
        known = {source: tensors[name] for name, source in sources.items()}
        if stored.keys() != known.keys():
            sources_here = _names(stored, rules, files[0], dropped).values()
            stored = {source: stored[source] for source in sources_here}
        if stored != known:
            raise InputError(_difference(stored, known, step, files[0]))
        checkpoints.append(
            Checkpoint(
                step, files, sum(header.size for header in file_headers), _joined(file_headers)
            )
        )
        still.add(step, files, file_headers)
    if dropped:
        names = few([*map(repr, dropped)], 6)
        notes = [
            *notes,
            f"left out {names}: --rename leaves nothing of the name, so the result knows nothing "
            "of what they hold",
        ]
    notes = [
        *notes,
        # of what was consumed nothing is known here but that it was there
        *([] if has_gaps else _late(chosen[0][0])),
        *([] if has_gaps else long_segments([step for step, _ in within], intervals, thinning)),
        *still.notes(),
    ]
    return Trajectory(root, tuple(checkpoints), tensors, sources, tuple(notes))


def _joined(headers: Sequence[Header]) -> int:
    crc = 0
    for header in headers:
        crc = (crc * 31 + header.fingerprint) % 2**32
    return crc


def _names(
    tensors: Mapping[str, TensorHeader],
    rules: list[tuple[re.Pattern[str], str]],
    file: Path,
    dropped: dict[str, None],
) -> dict[str, str]:
    """Return the name of each tensor → its name inside the file; add to `dropped` those whose names
    the rules make empty.
    """
    sources: dict[str, str] = {}
    for source in tensors:
        name = normalise(source)
        for regex, new in rules:
            try:
                name = regex.sub(new, name)
            except (re.error, IndexError) as error:
                raise InputError(
                    f"--rename {f'{regex.pattern}={new}'!r} cannot be applied to {name!r}: {error}."
                ) from None
        if not name and source:
            dropped[source] = None
            continue
        if name in sources:
            raise InputError(
                f"{sources[name]!r} and {source!r} in {file} both become {name!r}. Tell them apart "
                "with --rename OLD=NEW."
            )
        sources[name] = source
    return sources


def _difference(
    stored: Mapping[str, TensorHeader], known: Mapping[str, TensorHeader], step: int, file: Path
) -> str:
    for name in sorted({*stored, *known}):
        if stored.get(name) != known.get(name):
            break
    this = f"{stored[name].dtype} {list(stored[name].shape)}" if name in stored else "absent"
    first = f"{known[name].dtype} {list(known[name].shape)}" if name in known else "absent"
    return (
        f"tensor {name!r} is {this} in {file} (step {step}) but {first} at the first step. All "
        "checkpoints must come from one model; leave the odd ones out with --steps, or the tensor, "
        f"where the model computes the same without it, with {drop_options([normalise(name)])}"
    )


def _late(first: int) -> list[str]:
    """Return a note where the first checkpoint is not of the initial weights."""
    return (
        [f"the first checkpoint is step {first}: what changed before it is not part of the result"]
        if first > 0
        else []
    )


def read_checkpoint(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors of one checkpoint on the CPU, by the model's names, as they are stored,
    every number finite.

    Args:
        checkpoint: the files, with the size and fingerprint they had when the trajectory was
            opened.
        names: the model's name of each tensor → its name inside the files.

    Raises:
        SpanError: where a file changed since the trajectory was opened, or cannot be read.
        NotFiniteError: where a number is not finite.
    """
    import torch  # here, because a driver that only looks at headers need not load torch

    tensors = read_stored(checkpoint, names)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor.float())).sum())
            mask = (
                ""
                if bool(tensor.isnan().any())
                else f" A mask that never moves is named in Task(fixed=[{name!r}])."
            )
            raise NotFiniteError(
                f"tensor {name!r} holds {bad:,} NaN or Inf in {checkpoint.files[0]} (step "
                f"{checkpoint.step}). The segments that touch this step cannot be allocated; move "
                f"the file away and write another run with --out.{mask}",
                checkpoint.step,
            )
    return tensors


def _is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether every number of a floating tensor is finite."""
    import torch

    if not tensor.numel():
        return True
    # NaN and Inf pass through both; to ask of each number would take twenty times as long
    ends = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return bool(torch.isfinite(torch.stack(ends)).all())


def read_stored(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors of one checkpoint as `read_checkpoint` does, whatever numbers they hold.

    Only the bytes of these tensors are read, each once and into the memory the tensor keeps.

    Raises:
        SpanError: where a file changed since the trajectory was opened, or cannot be read.
    """
    from safetensors import SafetensorError

    from .reading import fingerprint_and_tensors

    tensors: dict[str, torch.Tensor] = {}
    crc = 0
    for path in checkpoint.files:
        try:
            own, part = fingerprint_and_tensors(path, checkpoint.fingerprint, set(names.values()))
        except (OSError, InputError, SafetensorError) as error:
            raise SpanError(
                f"cannot read {path} (step {checkpoint.step}): {error}. Restore the file and run "
                "again."
            ) from None
        crc = (crc * 31 + own) % 2**32
        tensors |= part
    if crc != checkpoint.fingerprint:
        raise SpanError(
            f"{checkpoint.files[0]} (step {checkpoint.step}) is not the file it was when the run "
            "was created. Restore it, or start a new run with --out."
        )
    return {name: tensors[source] for name, source in names.items()}
