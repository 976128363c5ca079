"""Read what torch.save, Lightning and older Hugging Face trainers wrote.

From pickles, only tensors and plain data are read (`torch.load(…, weights_only=True)`). Objects of
other classes, such as parsed arguments and paths, are skipped: a stand-in accepts whatever a file
gives it and does nothing (`standins`). Functions are rejected. Safetensors are read if a trainer
saved them at every step with its optimiser beside them.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import google_crc32c
import safetensors
import torch
from safetensors.torch import load_file

from ..checkpoints.discovery import shards, trainer_step
from ..checkpoints.headers import TensorHeader, fingerprint, read_header
from ..checkpoints.layouts import (
    BESIDE_THE_WEIGHTS,
    SAFETENSORS,
    WHOLE,
    both_count,
    count_epochs,
    epochs_are_meant,
    refuse_counted_saves,
    refuse_epochs,
    says_step,
    several_namings,
    states_epoch,
    step_in_name,
)
from ..checkpoints.places import Place
from ..checkpoints.steps import StepChoice
from ..checkpoints.trajectory import compile_pattern
from ..errors import InputError, few
from ..recording.staging import same_bytes
from .nested import state_dict
from .optimizers import Source, follow
from .series import (
    Beside,
    Iterate,
    Progress,
    Series,
    Tensors,
    headers_of,
    same_headers,
    separate,
    taken,
)
from .sharded import SHARD, is_sharded, read_shards, shard_files, shard_folder
from .standins import class_of, compare_checksums, holds_tensors_inside, is_left_out, unpickled

_COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")
_AVERAGED = re.compile(r"(module|ema_model|online_model|averaged_model|model_ema)\.")
_STEPS = ("global_step", "iter_num", "iteration", "step")
_OPTIMIZER = "optimizer.pt"  # beside the weights of a trainer
_EPOCHS = ("epoch", "cur_epoch", "current_epoch")


@dataclass(frozen=True)
class _Loaded:
    """Hold the contents of one checkpoint.

    Attributes:
        tensors: its tensors, not yet read if the file can be mapped.
        notes: notes for the user.
        step: the step it states, or None.
        step_entry: name of the entry that states the step.
        epoch: the epoch it states, or None.
        has_optimizer: whether it contains states of optimisers.
    """

    tensors: Tensors
    notes: list[str]
    step: int | None
    step_entry: str
    epoch: int | None
    has_optimizer: bool


@dataclass(frozen=True)
class _Saved:
    """Locate one checkpoint.

    Attributes:
        path: the path that names it.
        files: its files.
        key: the entry that is the state dict; None to search for it.
    """

    path: Path
    files: tuple[Path, ...]
    key: str | None

    def load(self, look: bool = False) -> _Loaded:
        """Load the tensors and what the files state.

        Args:
            look: whether the tensors' headers are enough, if reading values would mean joining
                shards.

        Raises:
            InputError: if a tensor occurs in two files.
        """
        tensors, notes = Tensors(), list[str]()
        steps, epochs, has_optimizer = list[tuple[int, str]](), list[int](), False
        for file in self.files:
            saved, passed = _contents(file, look)
            state, around, more = state_dict(saved, file, self.key)
            notes += more
            counters = _counters(state)
            if counters:
                state = {name: value for name, value in state.items() if name not in counters}
                notes.append(
                    f"left out {few([*map(repr, counters)])} of every checkpoint: "
                    f"{'they count' if len(counters) > 1 else 'it counts'} what is averaged "
                    "(torch.optim.swa_utils and its like)"
                )
            _refuse_hidden(state, file)
            own, more = taken(state, str(file))
            twice = sorted(own.keys() & tensors.keys())
            if twice:
                raise InputError(
                    f"tensor {twice[0]!r} is in {file} and in another shard of it. Save it again."
                )
            tensors |= own
            notes += more
            notes += passed
            steps += _stated_steps(saved, around)
            epochs += _stated_epochs(saved, around)
            has_optimizer |= bool(_optimizers_in(saved))
        step, entry = steps[0] if steps else (None, "")
        return _Loaded(
            tensors=tensors,
            notes=notes,
            step=step,
            step_entry=entry,
            epoch=epochs[0] if epochs else None,
            has_optimizer=has_optimizer,
        )

    def read(self) -> Tensors:
        """Return its tensors, after comparing the checksums of its files."""
        for file in self.files:
            _compare_checksums(file)
        return separate(self.load().tensors)

    def identity(self) -> str:
        """Return the CRC-32C of samples of the files and of `key`."""
        crc = google_crc32c.value(repr(self.key).encode())
        for file in self.files:
            crc = google_crc32c.extend(crc, _sampled(file).encode())
        return f"{crc:08x}"

    @property
    def beside(self) -> Path | None:
        """Return the file with an optimiser's state that a trainer wrote beside the weights, or
        None.
        """
        file = self.path / _OPTIMIZER
        return file if self.path.is_dir() and file.is_file() else None

    def source(self, headers: Mapping[str, TensorHeader]) -> Source:
        """Return access to an optimiser's state beside tensors with known headers."""

        def tensors() -> Tensors:
            loaded = self.load().tensors
            if headers_of(loaded) != headers:
                raise InputError(f"{self.files[0]} changed while it was imported")
            return loaded

        file = self.files[0] if self.beside is None else self.beside
        return Source(
            tensors=tensors,
            optimizer=lambda: _optimizer(file, inside=self.beside is None),
            identity=lambda: _sampled(file),
            check=lambda: _compare_checksums(file),
        )


def _contents(file: Path, look: bool) -> tuple[Mapping[str, object], list[str]]:
    """Read a file, also of safetensors, or a directory of shards; `look` as for `_Saved.load`.

    Return the contents, and notes on what was skipped.

    Raises:
        InputError: if it cannot be read.
    """
    if file.is_dir():
        return read_shards(file, look)
    if file.suffix != ".safetensors":
        return unpickled(file)
    read_header(file)
    try:
        return load_file(file), []
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{file} cannot be read as a checkpoint ({error}). Save it again, or move it away."
        ) from None


def _optimizer(file: Path, inside: bool) -> object:
    """Return the state of the only optimiser in a file.

    Args:
        file: file of a trainer's optimiser, or of a whole checkpoint.
        inside: whether it is a whole checkpoint.

    Raises:
        InputError: if the checkpoint holds several.
    """
    saved, _ = _contents(file, look=False)
    if not inside:
        return saved
    states = _optimizers_in(saved)
    if len(states) != 1:
        raise InputError(f"{file} holds states of several optimisers")
    return states[0]


def _compare_checksums(file: Path) -> None:
    """Check that a file, or every file in a directory of shards, is undamaged."""
    for part in shard_files(file) if file.is_dir() else [file]:
        if part.suffix != SHARD:  # its items are checked one by one when they are read
            compare_checksums(part)


def _optimizers_in(saved: Mapping[str, object]) -> list[object]:
    """Return the states of optimisers in a whole checkpoint, including those in a list."""
    entries: list[object] = []
    for value in saved.values():
        entries += value if isinstance(value, list) else [value]
    return [
        entry
        for entry in entries
        if isinstance(entry, Mapping) and "param_groups" in entry and "state" in entry
    ]


def _sampled(file: Path) -> str:
    if file.is_dir():
        return ",".join(_sampled(part) for part in shard_files(file))
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        return f"{size}:{fingerprint(lambda offset, count: os.pread(opened.fileno(), count, offset), size)}"


def _counters(state: Mapping[str, object]) -> list[str]:
    """Return the counters beside averaged weights, if all weights have the name prefix of an
    averaged model.
    """
    counters = [name for name in _COUNTERS if _counts(state.get(name))]
    rate = state.get("decay")
    if (
        counters
        and "decay" not in counters
        and isinstance(rate, torch.Tensor)
        and rate.numel() == 1
    ):
        counters.append("decay")  # the rate of the average, if there is also a counter
    return counters if all(_AVERAGED.match(name) for name in state if name not in counters) else []


def _counts(value: object) -> bool:
    """Return whether a value is a tensor of one whole number or flag; a trained number is neither."""
    return (
        isinstance(value, torch.Tensor)
        and value.numel() == 1
        and not (value.is_floating_point() or value.is_complex())
    )


def _refuse_hidden(state: Mapping[str, object], file: Path) -> None:
    """Check that no skipped object in a state dict may hold a weight.

    Raises:
        InputError: if one may.
    """
    for name, value in state.items():
        if is_left_out(value) and holds_tensors_inside(value):
            raise InputError(
                f"{name!r} in {file} is an object of {class_of(value)} with tensors in it, which "
                "is not loaded: that could run any code. If you trust the file, load it where its "
                "modules can be imported, and save plain tensors with torch.save."
            )


def _is_torch(path: Path) -> bool:
    """Return whether `torch.save` wrote a file; a damaged file or another pickle counts too if its
    name claims so.
    """
    claimed = path.suffix in (".ckpt", ".pt", ".pth", ".bin") or path.name.endswith(".pth.tar")
    if not path.is_file():
        return claimed and path.is_symlink()
    with path.open("rb") as file:
        head = file.read(32)
    if claimed and (not head or head.startswith((b"PK", b"\x80"))):
        return True
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    return head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19")


def is_safetensors(path: Path) -> bool:
    """Return whether an entry of a directory is a checkpoint that `lca run` reads directly."""
    if not path.is_dir():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in SAFETENSORS)


def _entry(path: Path) -> tuple[Path, ...]:
    """Return the files of one entry of a directory that hold a model; an empty tuple if it is not a
    checkpoint.

    Raises:
        InputError: if several files could be the model.
    """
    if path.name.startswith(".") or ".tmp" in path.name or BESIDE_THE_WEIGHTS.fullmatch(path.name):
        return ()
    if not path.is_dir():
        return (path,) if _is_torch(path) else ()
    if is_safetensors(path):
        return ()
    for name in WHOLE:
        if (path / name).is_file():
            return shards(path / name) if name.endswith(".json") else (path / name,)
    if (folder := shard_folder(path)) is not None:
        return (folder,)
    inside = [file for file in sorted(path.iterdir()) if not file.is_dir() and _entry(file)]
    if len(inside) > 1 and step_in_name(path.name) is not None:
        raise InputError(
            f"{path} holds {len(inside)} files that could be the model ({inside[0].name}, "
            f"{inside[1].name}, …). Keep one of them, or give a directory with one file for every "
            "step."
        )
    return tuple(inside) if len(inside) == 1 else ()


def is_pytorch(place: Path) -> bool:
    """Return whether a directory contains checkpoints of this kind, or a file is one."""
    if place.is_file() or is_sharded(place):
        return bool(_entry(place))
    return any(map(_entry, place.iterdir())) or _follows_every_step(place)


def _follows_every_step(place: Path) -> bool:
    """Return whether safetensors of consecutive steps have an optimiser's state beside them, which
    only an import reads.
    """
    steps = {
        _of_trainer(path) or step_in_name(path.name)
        for path in place.iterdir()
        if (path / _OPTIMIZER).is_file() and is_safetensors(path)
    }
    return any(step is not None and step + 1 in steps for step in steps)


def _safetensors(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a trainer's checkpoint; an empty tuple if it is not one."""
    for name in SAFETENSORS if path.is_dir() else ():
        if (path / name).is_file():
            return shards(path / name) if name.endswith(".json") else (path / name,)
    return ()


def open_pytorch(
    place: Path, progress: Progress, key: str | None = None, pattern: str | None = None
) -> Series:
    """Inspect every checkpoint in a directory once, and return the series: steps, tensors and
    notes.

    Args:
        place: directory of the checkpoints.
        progress: called as `progress(what, done, total)`.
        key: entry of each checkpoint that is the state dict; None to search for it.
        pattern: regular expression with a group `step`, searched for in each name.

    Raises:
        InputError: if a checkpoint holds more than tensors and plain data, states no step, or
            belongs to another model.
    """
    if place.is_file() or is_sharded(place):
        raise InputError(
            f"{place} is one checkpoint. Give the directory that holds one for every step, or its "
            "path with {step} in place of the step."
        )
    regex = compile_pattern(pattern) if pattern else None
    every, notes = _checkpoints_in(place, regex, key)
    named = f"--pattern '{pattern}'" if pattern else ""
    return _series(every, notes, _in_names(regex), named, progress)


def open_place(
    place: Place, wanted: StepChoice, progress: Progress, key: str | None = None
) -> Series:
    """Inspect the wanted checkpoints of a template with `{step}` once, and return the series as
    `open_pytorch` does.

    Args:
        place: the template.
        wanted: steps to import.
        progress: called as `progress(what, done, total)`.
        key: as for `open_pytorch`.

    Raises:
        InputError: as for `open_pytorch`; also if the template matches nothing to import, or a
            single step is missing.
    """
    by_step: dict[int, _Saved] = {}
    others = list[Path]()
    for step, path in place.all_steps():
        files = _entry(path)
        if files and step in by_step:
            raise InputError(
                f"{by_step[step].path} and {path} both are step {step}. Move one away."
            )
        if files:
            by_step[step] = _Saved(path, files, key)
        else:
            others.append(path)
    if others and not by_step:
        raise InputError(
            f"{place} matches nothing to import, only paths such as {others[0]}. Safetensors files "
            "need no import: give the same path to `lca run`."
        )
    steps = sorted(by_step)
    choice = wanted.choose(steps) if steps else None
    chosen = [] if choice is None else [by_step[steps[position]] for position in choice.used]
    step_of = {saved.path: step for step, saved in by_step.items()}
    notes = [] if choice is None else [*choice.notes]
    return _series(chosen, notes, step_of.get, str(place), progress)


def _in_names(regex: re.Pattern[str] | None) -> Callable[[Path], int | None]:
    """Return the function that reads the step from a name, by a pattern if there is one."""

    def in_name(path: Path) -> int | None:
        if regex is None:
            return step_in_name(path.name)
        named = regex.search(path.name)
        return (
            int(named["step"])
            if named and re.fullmatch("[0-9]{1,18}", named["step"] or "")
            else None
        )

    return in_name


def _series(
    every: Sequence[_Saved],
    notes: list[str],
    in_name: Callable[[Path], int | None],
    named: str,
    progress: Progress,
) -> Series:
    """Return the series of some checkpoints.

    Args:
        every: the checkpoints.
        notes: notes so far.
        in_name: returns the step that a path states, or None.
        named: how the user named the steps; "" if they come from file names.
        progress: called as `progress(what, done, total)`.
    """
    looked = list[_Looked]()
    for done, saved in enumerate(every):
        progress("looking at", done, len(every))
        loaded = saved.load(look=True)
        looked.append(
            _Looked(
                saved=saved,
                headers=headers_of(loaded.tensors),
                step=loaded.step,
                step_entry=loaded.step_entry,
                epoch=loaded.epoch,
                has_optimizer=loaded.has_optimizer or saved.beside is not None,
            )
        )
        notes += [note for note in loaded.notes if note not in notes]
    numbering = _Numbering(looked, in_name, named)
    known, first = dict[str, TensorHeader](), ""
    steps, unnamed = dict[int, _Looked](), list[_Saved]()
    for checkpoint in looked:
        step = numbering.step_of(checkpoint)
        if step is None:
            unnamed.append(checkpoint.saved)
            continue
        if step in steps:
            notes.append(_once_more(checkpoint.saved, steps[step].saved, step))
            continue
        known, first = known or checkpoint.headers, first or str(checkpoint.saved.files[0])
        same_headers(checkpoint.headers, known, str(checkpoint.saved.files[0]), first)
        steps[step] = checkpoint
    notes += _without_step(unnamed, bool(steps))
    notes += numbering.notes(steps)
    sources = {
        step: checkpoint.saved.source(known)
        for step, checkpoint in sorted(steps.items())
        if checkpoint.has_optimizer
    }
    optimizers, more = follow(sources, progress)
    iterates = [
        Iterate(
            step,
            str(checkpoint.saved.files[0]),
            checkpoint.saved.read,
            checkpoint.saved.identity,
            optimizers.get(step, Beside()),
        )
        for step, checkpoint in sorted(steps.items())
    ]
    return Series(iterates, known, notes + more)


def _checkpoints_in(
    place: Path, regex: re.Pattern[str] | None, key: str | None
) -> tuple[list[_Saved], list[str]]:
    """Return the checkpoints of a directory whose names match a pattern, and notes on what was left
    out.
    """
    paths = [path for path in place.iterdir() if regex is None or regex.search(path.name)]
    # sort a copy such as last.ckpt after its original
    paths.sort(key=lambda path: (step_in_name(path.name) is None, path.name))
    with_safetensors = _follows_every_step(place)
    every = [
        _Saved(path, files, key)
        for path in paths
        if (files := _entry(path) or (_safetensors(path) if with_safetensors else ()))
    ]
    taken_in = {saved.path for saved in every}
    beside = [
        path
        for path in paths
        if is_safetensors(path) and path not in taken_in and step_in_name(path.name) is not None
    ]
    notes = [f"left out {path.name}: it is safetensors, which is not imported" for path in beside]
    return every, notes


@dataclass(frozen=True)
class _Looked:
    """Hold what is known of a checkpoint after inspecting it.

    Attributes:
        saved: the checkpoint.
        headers: headers of its tensors.
        step: the step it states, or None.
        step_entry: name of the entry that states the step.
        epoch: the epoch it states, or None.
        has_optimizer: whether there is an optimiser's state.
    """

    saved: _Saved
    headers: dict[str, TensorHeader]
    step: int | None
    step_entry: str
    epoch: int | None
    has_optimizer: bool

    @property
    def name(self) -> str:
        return self.saved.path.name


class _Numbering:
    """Decide which training step each checkpoint of a series belongs to.

    Raises:
        InputError: if the numbers in names count epochs or saves, and nothing else states a step.
    """

    def __init__(
        self, looked: Sequence[_Looked], in_name: Callable[[Path], int | None], named: str
    ) -> None:
        self._in_name, self._named = in_name, named
        numbers = [
            (number, checkpoint)
            for checkpoint in looked
            if (number := self._in_name(checkpoint.saved.path)) is not None
        ]
        self._by_epoch = count_epochs(
            [
                (number, checkpoint.epoch)
                for number, checkpoint in numbers
                if checkpoint.epoch is not None
            ]
        )
        self._by_name = list[_Looked]()
        if named:
            return
        by_name = [
            checkpoint
            for _, checkpoint in numbers
            if checkpoint.step is None and _of_trainer(checkpoint.saved.path) is None
        ]
        if (
            self._by_epoch
            and by_name
            and not all(says_step(checkpoint.name) for checkpoint in by_name)
        ):
            refuse_epochs({checkpoint.name: checkpoint.epoch for checkpoint in by_name})
        refuse_counted_saves(
            [checkpoint.saved.path for checkpoint in by_name if checkpoint.saved.path.is_dir()]
        )
        self._by_name = by_name

    def step_of(self, looked: _Looked) -> int | None:
        """Return the training step: from the user's pattern, else from the file, else from a
        trainer's file beside it, else from the name.

        Raises:
            InputError: if name and file disagree.
        """
        number = self._in_name(looked.saved.path)
        if self._named:
            return number
        if looked.step is not None:
            counts_epochs = self._by_epoch and not says_step(looked.name)
            unlike_steps = looked.step_entry == "global_step" and not says_step(looked.name)
            if number not in (None, looked.step) and not counts_epochs and not unlike_steps:
                raise InputError(
                    f"{looked.saved.path} is called step {number} and states {looked.step} inside, "
                    "perhaps the step within an epoch. Choose the number in the name with --pattern."
                )
            return looked.step
        stated = _of_trainer(looked.saved.path)
        return number if stated is None else stated

    def notes(self, steps: Mapping[int, _Looked]) -> list[str]:
        """Return notes on the numbers, once every step is known.

        Raises:
            InputError: if steps in the files decrease as epochs increase.
        """
        if self._named:
            return [epochs_are_meant(self._named)] * self._by_epoch
        epochs = [
            (step, checkpoint)
            for step, checkpoint in sorted(steps.items())
            if checkpoint.epoch is not None and checkpoint.step is not None
        ]
        for (_, before), (step, after) in pairwise(epochs):
            if (after.epoch or 0) < (before.epoch or 0):
                raise InputError(
                    f"{after.saved.path} states {after.step_entry} {step} and epoch {after.epoch} "
                    f"inside, and {before.saved.path} {before.step} and epoch {before.epoch}: "
                    "these steps count within an epoch. Name training steps with --pattern."
                )
        notes = []
        inside = [
            checkpoint
            for step, checkpoint in steps.items()
            if checkpoint.step is not None and step_in_name(checkpoint.name) not in (None, step)
        ]
        if inside:
            first = inside[0]
            notes.append(
                f"{first.name} is read as step {first.step}, its {first.step_entry}; the number in "
                "its name counts something else"
                + (f" (as in {len(inside) - 1} more)" if len(inside) > 1 else "")
            )
        names = [checkpoint.name for checkpoint in self._by_name]
        if self._by_epoch and names:
            notes.append(both_count(names))
        return [*notes, *several_namings([_plain(name) for name in names])]


def _plain(name: str) -> str:
    """Remove the file extensions of torch.save from a name."""
    return re.sub(r"(\.(pt|pth|ckpt|bin|tar))+$", "", name)


def _of_trainer(path: Path) -> int | None:
    stated = trainer_step(path) if path.is_dir() else None
    return int(stated) if stated is not None and re.fullmatch("[0-9]{1,18}", stated) else None


def _stated_steps(
    saved: Mapping[str, object], around: Sequence[Mapping[str, object]]
) -> list[tuple[int, str]]:
    """Return the step a file states with the name of the entry; an empty list if it states none."""
    inside = [
        (step, name)
        for level in (saved, *around)
        for name in _STEPS
        if (step := _count(level.get(name))) is not None
    ]
    meta = saved.get("meta")
    if not inside and isinstance(meta, Mapping):  # mmcv stores it there
        step = _count(meta.get("iter"))
        return [] if step is None else [(step, "meta.iter")]
    return inside[:1]


def _stated_epochs(
    saved: Mapping[str, object], around: Sequence[Mapping[str, object]]
) -> list[int]:
    """Return the epochs a file states, from its own entries first."""
    inside = [
        epoch
        for level in (saved, *around)
        for name in _EPOCHS
        if (epoch := _epoch(level.get(name))) is not None
    ]
    meta = saved.get("meta")
    of_mmcv = _epoch(meta.get("epoch")) if isinstance(meta, Mapping) else None
    return [*inside[:1], *([] if of_mmcv is None else [of_mmcv])]


def _epoch(value: object) -> int | None:
    """Return an epoch from a whole number, stored as an integer, a float, a string or a tensor;
    None otherwise.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        value = int(value)
    return _count(value)


def _count(value: object) -> int | None:
    """Return a number of steps from a whole number or a tensor of one; None otherwise."""
    if (
        isinstance(value, torch.Tensor)
        and value.numel() == 1
        and not value.is_floating_point()
        and value.dtype != torch.bool
    ):
        value = value.item()
    return value if type(value) is int and value >= 0 else None


def _once_more(saved: _Saved, other: _Saved, step: int) -> str:
    """Return a note that a second file of a step, such as a `last.ckpt`, is left out.

    Raises:
        InputError: if the two differ.
    """
    if not same_bytes(saved.load().tensors, other.load().tensors):
        raise InputError(
            f"{other.path} and {saved.path} both claim step {step} and differ. Move one away, or "
            "tell steps apart with --pattern."
        )
    return f"left out {saved.path.name}: it is {other.path.name} (step {step}) again"


def _without_step(unnamed: Sequence[_Saved], some: bool) -> list[str]:
    """Return notes on final models beside the checkpoints.

    Raises:
        InputError: if another file states no step.
    """
    final = [saved for saved in unnamed if some and saved.path.name in WHOLE]
    lost = [saved.path for saved in unnamed if saved not in final]
    if not lost:
        return [f"left out {saved.path.name}: it states no step" for saved in final]
    shown = few([str(path) for path in lost])
    if any(states_epoch(path.name) for path in lost):
        refuse_epochs(dict.fromkeys(str(path) for path in lost if states_epoch(path.name)))
    raise InputError(
        f"cannot tell the training step of {shown}. Name the number with --pattern, for example "
        "--pattern 'run_(?P<step>\\d+)'; it skips names that do not match."
    )
