"""What torch.save, Lightning and older Hugging Face trainers wrote.

Of pickles only tensors and plain data are read (`torch.load(…, weights_only=True)`). Numbers of numpy, settings of argparse and paths
are read past, never made: numpy takes pointers from what it is given. What asks for more is refused.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from ..errors import InputError, few
from ..headers import TensorHeader, fingerprint
from ..recorder.staging import same_bytes
from ..trajectory import compile_pattern, shards, step_in_name, trainer_step
from .series import Iterate, Progress, Series, Tensors, headers_of, same_headers, separate, taken

_WITHIN = ("state_dict", "model", "model_state_dict", "module")
_COUNT = "n_averaged"
_STEPS = ("global_step", "iter_num", "iteration", "step")
_READ_PAST = (
    *("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "numpy.ndarray", "numpy.dtype"),
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
)
_EPOCH = re.compile(r"epoch[-_=]?\d+", re.IGNORECASE)
WHOLE = ("pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin")
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors")
_OF_THE_TRAINER = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states)(_\d+)?\.\w+")


class LeftOut:
    """Stands for what is read past."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_STAND_INS: list[Any] = [LeftOut, *((LeftOut, name) for name in _READ_PAST)]


@dataclass(frozen=True)
class _Saved:
    """One checkpoint: what names it, its files, and the entry of them that is the state dict."""

    path: Path
    files: tuple[Path, ...]
    key: str | None

    def load(self) -> tuple[Tensors, list[str], int | None]:
        """Its tensors, not read where the file can be mapped; notes; the step it states inside."""
        tensors, notes, steps = Tensors(), list[str](), list[int]()
        for file in self.files:
            saved = _unpickled(file)
            state = _state_dict(saved, file, self.key)
            if _is_average(state):
                state = {name: value for name, value in state.items() if name != _COUNT}
                notes.append(
                    f"left out {_COUNT!r} of every checkpoint: it counts what is averaged (torch.optim.swa_utils)"
                )
            found, more = taken(state, str(file))
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                raise InputError(f"tensor {twice[0]!r} stands in {file} and in another shard of it. Save it again.")
            tensors |= found
            notes += more
            inside = [_count(saved.get(name)) for name in _STEPS]
            steps += [step for step in inside if step is not None][:1]
        return tensors, notes, steps[0] if steps else None

    def read(self) -> Tensors:
        """Its tensors, from files whose checksums were compared."""
        for file in self.files:
            _compare_checksums(file)
        return separate(self.load()[0])

    def identity(self) -> str:
        """CRC-32C of samples of the files, with the entry that is taken."""
        crc = google_crc32c.value(repr(self.key).encode())
        for file in self.files:
            crc = google_crc32c.extend(crc, _sampled(file).encode())
        return f"{crc:08x}"


def _compare_checksums(file: Path) -> None:
    """Refuse an archive whose content is not what was written, which torch itself does not look at."""
    if not zipfile.is_zipfile(file):
        return
    record = None
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                with archive.open(record) as opened:
                    while record.CRC and opened.read(2**20):  # 0 where torch was told to write none
                        pass
    except Exception as error:
        name = record.filename if record else "its list of contents"
        raise InputError(
            f"{file} is damaged: {name} is not what its checksum says ({type(error).__name__}). Copy it again, or move it away."
        ) from None


def _sampled(file: Path) -> str:
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        return f"{size}:{fingerprint(lambda at, count: os.pread(opened.fileno(), count, at), size)}"


def _unpickled(file: Path) -> Any:
    """What `torch.save` wrote, as far as it is tensors and plain data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of a file
            with torch.serialization.safe_globals(_STAND_INS):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        asked = _asked_for(file)
        what = (
            f"holds more than tensors and plain data ({asked})"
            if asked
            else "is damaged, or holds more than tensors and plain data"
        )
        raise InputError(
            f"{file} {what}, and is not loaded: that could run any code. Where you trust it, load it with "
            "weights_only=False where its modules can be imported, and save its state dict alone with torch.save."
        ) from None
    except Exception as error:
        what = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            f"{file} cannot be read as a checkpoint ({type(error).__name__}: {what}). Save it again, or move it away."
        ) from None


def _asked_for(file: Path) -> str:
    """The functions and classes a pickle asks for, as far as they can be told without running it."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a zip archive: nothing can be said
        return ""
    return few(names)


def _holds_tensors(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(each, torch.Tensor) for each in value.values())
    )


def _state_dict(saved: Any, file: Path, key: str | None) -> Mapping[str, Any]:
    """The entry that is the model's state dict, or the whole where nothing inside is one."""
    if not isinstance(saved, Mapping):
        raise InputError(f"{file} holds a {type(saved).__name__}, no state dict. Save model.state_dict().")
    found = [name for name, value in saved.items() if _holds_tensors(value)]
    if key is not None and key not in found:
        raise InputError(f"--key {key!r}: {file} holds no tensors there. {_entries(saved, found)}")
    known = [name for name in found if name in _WITHIN]
    chosen = [key] if key is not None else known
    if len(chosen) == 1:
        state: Mapping[str, Any] = saved[chosen[0]]
        return state
    if not found and _holds_tensors(saved):
        return saved
    if not found:
        raise InputError(f"{file} holds no state dict. {_entries(saved, found)}")
    raise InputError(f"which state dict of {file} is meant is not clear. {_entries(saved, found)}")


def _is_average(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of `torch.optim.swa_utils.AveragedModel`: the model's, one level down, and a count."""
    return _COUNT in state and all(name.startswith("module.") for name in state if name != _COUNT)


def _entries(saved: Mapping[Any, Any], found: Sequence[str]) -> str:
    keys = few([repr(name)[:80] for name in saved], 8) or "none"
    if not found:
        return f"Its keys are {keys}, none of them with tensors in it."
    return f"Its keys are {keys}; tensors are in {few([repr(name)[:80] for name in found], 8)}: name one with --key."


def _is_torch(path: Path) -> bool:
    """Whether a file is what `torch.save` writes; one that is damaged or some other pickle counts where its name claims it is."""
    claimed = path.suffix in (".ckpt", ".pt", ".pth", ".bin")
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
    """Whether an entry of a directory is a checkpoint that `lca run` reads as it is."""
    if not path.is_dir():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in SAFETENSORS)


def _entry(path: Path) -> tuple[Path, ...]:
    """The files of one entry of a directory that hold a model; none where it is no checkpoint."""
    if path.name.startswith(".") or ".tmp" in path.name or _OF_THE_TRAINER.fullmatch(path.name):
        return ()
    if not path.is_dir():
        return (path,) if _is_torch(path) else ()
    if is_safetensors(path):
        return ()
    for name in WHOLE:
        if (path / name).is_file():
            return shards(path / name) if name.endswith(".json") else (path / name,)
    inside = [each for each in sorted(path.iterdir()) if not each.is_dir() and _entry(each)]
    if len(inside) > 1 and step_in_name(path.name) is not None:
        raise InputError(
            f"{path} holds {len(inside)} files that could be the model ({inside[0].name}, {inside[1].name}, …). Leave one there, or give "
            "a directory of one file for every step."
        )
    return tuple(inside) if len(inside) == 1 else ()


def is_pytorch(place: Path) -> bool:
    """Whether a directory has checkpoints of this kind in it, or a file is one."""
    return bool(_entry(place)) if place.is_file() else any(map(_entry, place.iterdir()))


def open_pytorch(place: Path, progress: Progress, key: str | None = None, pattern: str | None = None) -> Series:
    """Every checkpoint in a directory, looked at once: its step, its tensors, what is left out of it.

    Raises:
        InputError: where one cannot be read as tensors and plain data, states no step, or is of another model.
    """
    if place.is_file():
        raise InputError(f"{place} is one checkpoint. Give the directory that holds one for every step.")
    regex = compile_pattern(pattern) if pattern else None
    paths = [path for path in place.iterdir() if regex is None or regex.search(path.name)]
    # a copy such as last.ckpt after its original
    paths.sort(key=lambda path: (step_in_name(path.name) is None, path.name))
    every = [_Saved(path, files, key) for path in paths if (files := _entry(path))]
    steps, unnamed = dict[int, _Saved](), list[_Saved]()
    beside = [path for path in paths if is_safetensors(path) and step_in_name(path.name) is not None]
    notes = [f"left out {path.name}: it is safetensors, which is not imported" for path in beside]
    known, first = dict[str, TensorHeader](), ""
    for done, saved in enumerate(every):
        progress("looking at", done, len(every))
        tensors, more, inside = saved.load()
        step = _step(saved.path, regex, inside)
        if step is None:
            unnamed.append(saved)
            continue
        if step in steps:
            notes.append(_once_more(saved, tensors, steps[step], step))
            continue
        found = headers_of(tensors)
        known, first = known or found, first or str(saved.files[0])
        same_headers(found, known, str(saved.files[0]), first)
        steps[step] = saved
        notes += [note for note in more if note not in notes]
    notes += _without_step(unnamed, bool(steps))
    iterates = [Iterate(step, str(saved.files[0]), saved.read, saved.identity) for step, saved in sorted(steps.items())]
    return Series(iterates, known, notes)


def _count(value: Any) -> int | None:
    """A number of steps: a whole number, or a tensor of one."""
    if (
        isinstance(value, torch.Tensor)
        and value.numel() == 1
        and not value.is_floating_point()
        and value.dtype != torch.bool
    ):
        value = value.item()
    return value if type(value) is int and value >= 0 else None


def _step(path: Path, regex: re.Pattern[str] | None, inside: int | None) -> int | None:
    if regex is not None:
        named = regex.search(path.name)
        return int(named["step"]) if named and re.fullmatch("[0-9]{1,18}", named["step"] or "") else None
    named_step = step_in_name(path.name)
    if inside is not None:
        if named_step is not None and named_step != inside:
            raise InputError(
                f"{path} is called step {named_step} and says {inside} inside, perhaps the step of an epoch. Say which names to go by with "
                "--pattern."
            )
        return inside
    stated = trainer_step(path) if path.is_dir() else None
    if stated is not None and re.fullmatch("[0-9]{1,18}", stated):
        return int(stated)
    return named_step


def _once_more(saved: _Saved, tensors: Tensors, other: _Saved, step: int) -> str:
    """A second file of one step, such as a `last.ckpt`, is left out where it holds the same numbers."""
    theirs = other.load()[0]
    if not same_bytes(tensors, theirs):
        raise InputError(
            f"{other.path} and {saved.path} both claim step {step} and differ. Move one away, or tell steps apart with --pattern."
        )
    return f"left out {saved.path.name}: it is {other.path.name} (step {step}) again"


def _without_step(unnamed: Sequence[_Saved], some: bool) -> list[str]:
    """Notes on final models beside the checkpoints; refuse what else states no step."""
    final = [each for each in unnamed if some and each.path.name in WHOLE]
    lost = [each.path for each in unnamed if each not in final]
    if not lost:
        return [f"left out {each.path.name}: it states no step" for each in final]
    shown = few([str(path) for path in lost])
    if any(_EPOCH.search(path.name) for path in lost):
        raise InputError(
            f"{shown}: an epoch is stated and no training step, and one segment would span all steps of an epoch. Where that is meant, "
            "name the number with --pattern 'epoch[-_=]?(?P<step>\\d+)'."
        )
    raise InputError(
        f"cannot tell the training step of {shown}. Name the number with --pattern, for example --pattern 'run_(?P<step>\\d+)'; what it "
        "does not match is left out."
    )
