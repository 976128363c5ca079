"""Recognise the files that other programs leave in a directory, by name and first bytes, without
unpickling.

`lca run` and `lca import` meet the same directories; both use the error messages of this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, few
from .headers import GGUF

WHOLE = ("pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin")
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors")
MOMENTS = "moments"  # a recorder's directory for optimiser moments, beside the checkpoints
IMPORTED = (".ckpt", ".pt", ".pth", ".bin", ".tar", ".h5", ".hdf5")
BESIDE_THE_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state_dict|custom_checkpoint|training_args|rng_state|random_states)(_\d+)?\.\w+"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z])((?:checkpoint|ckpt|global_?step|step|iter(?:ate|ation)?)[-_=]?)(\d+)(?!\d|[eE.]\d)",
    re.IGNORECASE,
)
_SAYS_STEP = re.compile(r"(?:global_?)?step|iter", re.IGNORECASE)
_SAYS_EPOCH = re.compile(r"(epoch[-_=]?)\d+", re.IGNORECASE)
_OF_ACCELERATE = re.compile(r"checkpoint_\d+")


@dataclass(frozen=True)
class Unreadable:
    """Describe a layout that `lca run` cannot read.

    Attributes:
        name: name of the layout.
        recognises: returns whether a path holds it.
        words: the predicate of the error message.
        is_imported: whether `lca import` reads it.
    """

    name: str
    recognises: Callable[[Path], bool]
    words: str
    is_imported: bool = False


def _sharded(*patterns: str) -> Callable[[Path], bool]:
    """Return a function that looks for files of these names in a directory or up to two levels
    below.

    It ignores them if a whole model lies beside or above them.
    """

    def recognises(place: Path) -> bool:
        for pattern in patterns:
            for depth in ("", "*/", "*/*/"):
                for mark in place.glob(depth + pattern) if place.is_dir() else ():
                    above = [
                        parent
                        for parent in mark.parents
                        if parent == place or place in parent.parents
                    ]
                    if not any(
                        (parent / name).is_file()
                        for parent in above
                        for name in (*WHOLE, *SAFETENSORS)
                    ):
                        return True
        return False

    return recognises


def _is_gguf(place: Path) -> bool:
    """Return whether a path is a GGUF file, or a directory with GGUF files and no checkpoints of
    another format.
    """
    if place.is_file():
        with place.open("rb") as file:
            return file.read(4) == b"GGUF"
    return _sharded("*.gguf")(place) and not any(
        path.suffix in (".safetensors", *IMPORTED) for path in place.iterdir()
    )


UNREADABLE = (
    Unreadable(
        "DeepSpeed shards",
        _sharded("*mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt"),
        "DeepSpeed shards: `lca import SOURCE DIR` joins those of every step in float32 and "
        "writes a directory to read instead.",
        is_imported=True,
    ),
    Unreadable(
        "Megatron shards",
        _sharded(
            "mp_rank_*/model_optim_rng.pt", "mp_rank_*/model_rng.pt", "mp_rank_*/distrib_optim.pt"
        ),
        "Megatron shards, which only Megatron can join: convert every iteration with its "
        "tools/checkpoint/convert.py, and import or read the result.",
    ),
    Unreadable(
        "torch.distributed.checkpoint shards",
        _sharded("*.distcp"),
        "torch.distributed.checkpoint shards: `lca import SOURCE DIR` joins those of every step "
        "and writes a directory to read instead.",
        is_imported=True,
    ),
    Unreadable(
        "GGUF",
        _is_gguf,
        GGUF,
    ),
)


def refuse_unreadable(place: Path) -> None:
    """Raise an error for a directory or file that only another program can read.

    Raises:
        InputError: if it is one; the message says what it holds and how to convert it.
    """
    for layout in UNREADABLE:
        if layout.recognises(place):
            raise InputError(f"{place} holds {layout.words}")


# --- numbers in names -----------------------------------------------------------------------------


def step_in_name(name: str) -> int | None:
    """Return the training step that a file or directory name states, or None; never just the last
    number in it.

    >>> step_in_name("checkpoint-30000step"), step_in_name("step_1e5"), step_in_name("model-00001-of-00004")
    (30000, None, None)
    """
    numbers = {int(number) for _, number in _NUMBER.findall(name) if len(number) < 19}
    return numbers.pop() if len(numbers) == 1 else None


def says_step(name: str) -> bool:
    """Return whether a name calls its number a step or an iteration, rather than that of a
    checkpoint.

    >>> says_step("epoch=1-step=20"), says_step("checkpoint-20.pth")
    (True, False)
    """
    return any(_SAYS_STEP.match(word) for word, _ in _NUMBER.findall(name))


def states_epoch(name: str) -> bool:
    """Return whether a name states an epoch."""
    return _SAYS_EPOCH.search(name) is not None


def pattern_of(name: str) -> str:
    """Return a `--pattern` for names like this one, from the word before its number.

    >>> pattern_of("checkpoint_0003.pth.tar"), pattern_of("net_epoch_12.pth")
    ('checkpoint_(?P<step>\\\\d+)', 'epoch_(?P<step>\\\\d+)')
    """
    word = next((word for word, _ in _NUMBER.findall(name)), None)
    epoch = _SAYS_EPOCH.search(name)
    return f"{word or (epoch[1] if epoch else '')}(?P<step>\\d+)"


def count_epochs(pairs: Sequence[tuple[int, int]]) -> bool:
    """Return whether the numbers in names increase one by one with the epochs in the files.

    Some programs save the number of the finished epoch and some that of the next, so only
    differences matter. Numbers that count steps increase by the steps of an epoch, or change within
    one.

    >>> count_epochs([(0, 1), (1, 2), (4, 5)]), count_epochs([(0, 0), (10, 1)]), count_epochs([(0, 0), (1, 0)])
    (True, False, False)

    Args:
        pairs: (number in the name, epoch in the file) of each checkpoint.
    """
    return (
        len({epoch for _, epoch in pairs}) > 1
        and len({number - epoch for number, epoch in pairs}) == 1
    )


def refuse_epochs(names: Mapping[str, int | None]) -> None:
    """Raise an error for names whose numbers count epochs.

    Args:
        names: name → the epoch in its file, or None.

    Raises:
        InputError: always; the message has the `--pattern` that accepts epochs.
    """
    inside = sorted(epoch for epoch in names.values() if epoch is not None)
    in_files = f" (the files hold epoch {few([*map(str, inside)])})" if inside else ""
    numbered = [name for name in names if step_in_name(name) is not None or states_epoch(name)]
    what = (
        f"cannot tell the training step of {few([*names])}: they state an epoch and no training "
        "step, and one segment would span all steps of an epoch"
        if step_in_name(numbered[0]) is None
        else f"{few([*names])}: the number in the name is the epoch{in_files} and not a training "
        f"step, and one segment would span all "
        "steps of an epoch"
    )
    raise InputError(
        f"{what}. If you want that, name the number with --pattern '{pattern_of(numbered[0])}'; it "
        "skips names that do not match."
    )


def epochs_are_meant(names: str) -> str:
    """Return the note for numbers that the user named although they count epochs.

    Args:
        names: `--pattern` with its argument, or a template with `{step}`.
    """
    return (
        f"the numbers {names} names are the epochs the files hold: every segment "
        "spans all steps of an epoch or more, and the straight line between its ends is not the "
        "path that training took"
    )


def both_count(names: Sequence[str]) -> str:
    """Return the note for names that say step while the files hold the same number as their epoch."""
    return (
        f"{few(names)}: the name calls the number a training step, so it is read as one, but the "
        "files hold the same number as their epoch. If an epoch has several steps, a segment spans "
        "all of them"
    )


def refuse_counted_saves(entries: Sequence[Path]) -> None:
    """Raise an error for directories of accelerate's `save_state` whose numbers count saves:
    `checkpoint_0`, `checkpoint_1`, ….

    Numbers that are not consecutive come from the user's code, and count as training steps.

    Raises:
        InputError: if the numbers count saves; the message has the `--pattern` that accepts them.
    """
    of_accelerate = [
        entry
        for entry in entries
        if _OF_ACCELERATE.fullmatch(entry.name) and any(entry.glob("random_states_*.pkl"))
    ]
    numbers = sorted(int(entry.name.partition("_")[2]) for entry in of_accelerate)
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        raise InputError(
            f"{few([entry.name for entry in of_accelerate])}: accelerate's save_state counts its "
            "saves, so the number is not a training step, and one segment would span all steps "
            "between two saves. If you want that, name the number with "
            "--pattern 'checkpoint_(?P<step>\\d+)'; else rename the directories to step_N, where N "
            "is the optimiser step."
        )


def several_namings(names: Sequence[str]) -> list[str]:
    """Return a note if names differ in more than their numbers, as with two training runs.

    >>> several_namings(["a_step_1", "a_step_20", "b_step_3"])[0].partition(":")[0]
    'names are of 2 kinds'
    """
    kinds: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"\d+(?:\.\d+)*", "#", name)
        kinds[kind] = kinds.get(kind, 0) + 1
    if len(kinds) < 2:
        return []
    shown = few([f"{kind!r} ({count})" for kind, count in kinds.items()])
    return [
        f"names are of {len(kinds)} kinds: {shown}. They are read as checkpoints of one training "
        "run; if they come from several, choose one with --pattern"
    ]
