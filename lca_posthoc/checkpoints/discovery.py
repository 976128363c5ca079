"""Find the checkpoints of a series, in files, directories and templates, and the step of each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..base.text import quoted
from ..errors import InputError, few
from .headers import Header, joined, read_header
from .layouts import (
    BESIDE_THE_WEIGHTS,
    IMPORTED,
    MOMENTS,
    SAFETENSORS,
    both_count,
    count_epochs,
    epochs_are_meant,
    refuse_counted_saves,
    refuse_epochs,
    refuse_unreadable,
    says_step,
    several_namings,
    states_epoch,
    step_in_name,
)
from .paths import is_remote, reached
from .places import STEP, Place, revisions
from .steps import StepChoice

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_INDEX = "model.safetensors.index.json"
AT_A_TIME = 16
_NUMBERS = re.compile("[0-9]{1,18}")
_DEPTHS = ("*", "*/*", "*/*/*")  # searched below the directory of a step
_READ = (".safetensors", *IMPORTED)


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


def too_few(places: Sequence[Place], steps: list[int], which: str) -> str:
    """Return the error message for fewer than two checkpoints.

    Args:
        places: the places that were searched.
        steps: the steps that were found.
        which: a restriction on the steps, to end a clause of the message; "" for none.

    Raises:
        InputError: if a place holds files that only an import or another program reads.
    """
    for place in places:
        if not place.rest:
            refuse_unreadable(place.root)
    hint = "".join(
        _importable(place.root) or _in_folders(place.root) for place in places if not place.rest
    )
    only = f"only one checkpoint (step {steps[0]})" if steps else "no checkpoint"
    return (
        f"{few([*map(str, places)])} holds {only}{which}; at least two are needed, because a "
        "segment runs from one to the next. Expected files such as step_00000010.safetensors or "
        f"checkpoint-10/model.safetensors.{hint}"
    )


def _importable(root: Path) -> str:
    """Return a hint if the directory holds checkpoints of another format, else ""."""
    files = [path for path in root.iterdir() if path.suffix in IMPORTED]
    kinds = ", ".join(sorted({path.suffix for path in files}))
    return (
        f" It holds {len(files)} files of {kinds}: `lca import {quoted(root)} DIR` makes a "
        "directory of them that does."
        if files
        else ""
    )


def _in_folders(root: Path) -> str:
    """Return a hint with the template to use if every step has a directory that is not searched,
    else "".
    """
    if is_remote(root):
        return ""
    folders = [
        path
        for path in sorted(root.iterdir())
        if path.is_dir() and len(_NUMBERS.findall(path.name)) == 1
    ]
    for folder in folders:
        files = [
            path
            for path in sorted(path for depth in _DEPTHS for path in folder.glob(depth))
            if not BESIDE_THE_WEIGHTS.fullmatch(path.name)
        ]
        named = [path for path in files if path.name in SAFETENSORS]
        chosen = next(iter([*named, *(path for path in files if path.suffix in _READ)]), None)
        if chosen is not None:
            step = _NUMBERS.sub(STEP, folder.name)
            inside = chosen.relative_to(folder).as_posix()
            number = _NUMBERS.findall(folder.name)[0]
            place = quoted(root / step / inside.replace(number, STEP))
            command = "lca run" if chosen.suffix in (".safetensors", ".json") else "lca import"
            return f" Where every step has a folder, name the files in them: {command} {place} …"
    return ""


class Headers(dict[Path, Header]):
    """Read the header of each file at most once: for the step it states, then for its tensors."""

    def __missing__(self, path: Path) -> Header:
        self[path] = read_header(path)
        return self[path]

    def fetch(self, paths: Sequence[Path]) -> None:
        """Read the headers of many files concurrently."""
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            for _ in pool.map(self.__getitem__, paths):
                pass

    def pop(self, path: Path) -> Header:  # type: ignore[override]
        """Remove a header and return it."""
        header = self[path]
        del self[path]
        return header


@dataclass(frozen=True)
class Entry:
    """Describe one checkpoint of a directory: its step, its files, and whether its name alone
    states the step.
    """

    path: Path
    name: str
    step: int
    files: tuple[Path, ...]
    by_name: bool


def series(
    places: Sequence[Place], wanted: StepChoice, regex: re.Pattern[str] | None, headers: Headers
) -> tuple[list[Entry], list[str]]:
    """Find the checkpoints of all places.

    Args:
        places: directories, or templates with `{step}`.
        wanted: the steps the user chose.
        regex: `--pattern`, with a group named `step`; None to read names and metadata.
        headers: cache of headers, filled by this call.

    Returns:
        The checkpoints in ascending order of step, and notes on what was left out.

    Raises:
        InputError: if two different files claim one step, a step cannot be determined, or a place
            cannot be read.
    """
    series: dict[int, Entry] = {}
    notes: list[str] = []
    for place in places:
        if place.rest:
            if regex is not None:
                raise InputError(
                    f"{place} names the step with {STEP}, and --pattern names it too. Leave "
                    "--pattern out."
                )
            entries = _formed(place, wanted)
        else:
            _require_directory(place.root)
            entries, more = _discover(place.root, regex, headers)
            notes += more
        for entry in entries:
            other = series.setdefault(entry.step, entry)
            if other is not entry:
                notes.append(_once_more(entry, other, headers))
    return sorted(series.values(), key=lambda entry: entry.step), notes


def _once_more(entry: Entry, other: Entry, headers: Headers) -> str:
    """Return a note on a step that two places hold; raise an error if the files differ.

    Raises:
        InputError: if the files differ.
    """
    size, crc = (
        [sum(headers[file].size for file in one.files) for one in (entry, other)],
        [joined(headers[file].fingerprint for file in one.files) for one in (entry, other)],
    )
    if size[0] != size[1] or crc[0] != crc[1]:
        raise InputError(_both_claim(other, entry.files[0], entry.step))
    return f"left out {entry.files[0]}: it is {other.files[0]} (step {entry.step}) again"


def _both_claim(other: Entry, file: Path, step: int) -> str:
    files = (other.files[0], file)
    names = [step_in_name(path.name.removesuffix(".safetensors")) for path in files]
    odd = [
        f"{path.name} says step {number} in its name and {step} in its metadata"
        for path, number in zip(files, names, strict=True)
        if number not in (None, step)
    ]
    way = (
        f"{', '.join(odd)}: it may be a copy under a wrong name. Save that step again, or take the "
        r"steps from the names with --pattern '(?P<step>\d+)'."
        if odd
        else "Remove one, or tell steps apart with --pattern."
    )
    return f"{files[0]} and {files[1]} both claim step {step}. {way}"


def _formed(place: Place, wanted: StepChoice) -> list[Entry]:
    """Return the checkpoints that match a template with `{step}`.

    If the place is remote and the user listed single steps, look up only those; else list the
    place.

    Raises:
        InputError: if the steps cannot be listed, or two files claim one step.
    """
    singles = wanted.singles
    if singles is not None and is_remote(place.root):
        paths = [(step, place.of_step(step)) for step in singles]
    elif not place.is_listed:
        raise InputError(
            f"the steps of {place} cannot be listed. Name them, as in --steps 0,1,2,4,8."
        )
    else:
        if not is_remote(place.root):
            _require_directory(place.root)
        paths = place.all_steps()
    with ThreadPoolExecutor(AT_A_TIME if is_remote(place.root) else 1) as pool:
        every = list(zip(paths, pool.map(_files_of, [path for _, path in paths]), strict=True))
    entries: dict[int, Entry] = {}
    for (step, path), files in every:
        if files and step in entries:
            raise InputError(_both_claim(entries[step], files[0], step))
        if files:
            entries[step] = Entry(path, path.name, step, files, by_name=True)
    if paths and not entries:
        _refuse_other_files(place, [path for _, path in paths])
    return [*entries.values()]


def _refuse_other_files(place: Place, paths: Sequence[Path]) -> None:
    """Raise an error for a template that matches no safetensors.

    Raises:
        InputError: always.
    """
    if not is_remote(place.root):
        refuse_unreadable(paths[0])
    raise InputError(
        f"{place} names nothing that holds a safetensors checkpoint, such as {paths[0]}. Other "
        "formats of torch are read by `lca import DIRECTORY NEW_DIRECTORY`."
    )


def _files_of(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files behind a path with its step filled in: a file, an index, or the
    directory of one checkpoint.
    """
    return shards(path) if path.name.endswith(".index.json") else _files(path)


def _discover(
    root: Path, regex: re.Pattern[str] | None, headers: Headers
) -> tuple[list[Entry], list[str]]:
    """Return the checkpoints of a directory, one for each step, and notes on what was left out.

    Raises:
        InputError: if two files claim one step, or a step is unknown.
    """
    named: dict[int, Entry] = {}
    unnamed: list[Path] = []
    for name, path, files in _listed(root, headers):
        if not files:
            continue
        step, by_name = _step(name, path, files == (path,), regex, headers)
        if step is None:
            unnamed.append(path)
        elif step in named:
            raise InputError(_both_claim(named[step], files[0], step))
        else:
            named[step] = Entry(path, name, step, files, by_name)
    if regex is not None:
        return [*named.values()], []
    is_cache = revisions(root) is not None
    final = [
        path
        for path in unnamed
        if named and (is_cache or path.stem == "model" or _SHARD.search(path.stem))
    ]
    _refuse_without_step([path for path in unnamed if path not in final])
    return [*named.values()], [f"left out {path.name}: it states no step" for path in final]


def _listed(root: Path, headers: Headers) -> list[tuple[str, Path, tuple[Path, ...]]]:
    """Return the entries of a directory, sorted by name, each with its safetensors files."""
    named = revisions(root) or [(path.name, path) for path in sorted(root.iterdir())]
    # remote entries are slow, so look at several at a time
    with ThreadPoolExecutor(AT_A_TIME if is_remote(root) else 1) as pool:
        every = [
            (name, path, files)
            for (name, path), files in zip(
                named, pool.map(_files, [path for _, path in named]), strict=True
            )
        ]
    if is_remote(root):
        headers.fetch([file for *_, files in every for file in files])
    return every


def _refuse_without_step(lost: list[Path]) -> None:
    """Raise an error for checkpoints whose step is unknown.

    Raises:
        InputError: if there are any.
    """
    if any(states_epoch(path.name) for path in lost):
        refuse_epochs(dict.fromkeys([path.name for path in lost if states_epoch(path.name)]))
    if lost:
        raise InputError(
            "cannot tell the training step of "
            f"{', '.join(str(path) for path in lost[:3])}{f' and {len(lost) - 3} more' if len(lost) > 3 else ''}. "
            "Name the number with --pattern, for example --pattern 'run_(?P<step>\\d+)'."
        )


def counted(root: Path, entries: Sequence[Entry], named: str, headers: Headers) -> list[str]:
    """Raise an error if numbers in names count epochs or saves; if that is uncertain or the user
    asked for it, return notes.

    Args:
        root: directory of the series.
        entries: checkpoints of the series.
        named: how the user named the numbers; "" if they come from file names.
        headers: cache of headers of their files.

    Raises:
        InputError: if the numbers count epochs or saves and the user did not name them.
    """
    by_name = [entry for entry in entries if entry.by_name]
    if not by_name:
        return []
    epochs = {entry: _epoch_of(headers[entry.files[0]]) for entry in by_name}
    counts = count_epochs(
        [(entry.step, epoch) for entry, epoch in epochs.items() if epoch is not None]
    )
    if named:
        return [epochs_are_meant(named)] if counts else []
    if not is_remote(root):
        refuse_counted_saves([entry.path for entry in by_name if entry.path.is_dir()])
    notes = several_namings([entry.name for entry in by_name])
    if counts:
        if not all(says_step(entry.name) for entry in by_name):
            refuse_epochs({entry.name: epoch for entry, epoch in epochs.items()})
        notes.append(both_count([entry.name for entry in by_name]))
    return notes


def _epoch_of(header: Header) -> int | None:
    """Return the epoch in a file's metadata, or None."""
    stated = header.metadata.get("epoch", "")
    return int(stated) if re.fullmatch("[0-9]{1,18}", stated) else None


def _files(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files of one entry of the directory; an empty tuple if it is not a
    checkpoint.

    Raises:
        InputError: if a directory holds several files and no index.
    """
    if path.name.startswith(".") or ".tmp" in path.name:
        return ()
    # over HTTP, asking whether this is a file would download it; trust the suffix
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
    """Return the files that a shard index names, which lie beside it.

    Raises:
        InputError: if the file is not an index, or a file it names is missing.
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
    name: str, path: Path, is_file: bool, regex: re.Pattern[str] | None, headers: Headers
) -> tuple[int | None, bool]:
    """Return the step of an entry, or None, and whether its name alone states it.

    Raises:
        InputError: if the metadata state something other than a step.
    """
    if regex is not None:
        match = regex.search(name)
        return (
            int(match["step"]) if match and re.fullmatch("[0-9]{1,18}", match["step"]) else None
        ), True
    stated = headers[path].metadata.get("step") if is_file else trainer_step(path)
    if stated is not None and re.fullmatch("[0-9]{1,18}", stated):
        return int(stated), False
    if stated is not None and is_file:
        raise InputError(
            f"{path} states {stated[:40]!r} as its step in its metadata, which is not a "
            "training step. Name steps with --pattern."
        )
    return step_in_name(name.removesuffix(".safetensors")), True


def trainer_step(directory: Path) -> str | None:
    """Return the step that a trainer wrote beside the weights, as text, or None."""
    try:
        return str(json.loads((directory / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
