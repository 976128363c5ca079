"""Recognise what other programs leave in a directory, by names and a few first bytes: nothing is
unpickled here.

`lca run` and `lca import` meet the same directories; what both refuse, they refuse with the words
of this module.
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
MOMENTS = "moments"  # a recorder's folder of an optimiser's moments, beside the checkpoints
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
    """A layout that `lca run` cannot read: its name, a function that recognises a place that holds
    it, the words of the refusal, and whether `lca import` reads it.
    """

    name: str
    recognises: Callable[[Path], bool]
    words: str
    is_imported: bool = False


def _sharded(*patterns: str) -> Callable[[Path], bool]:
    """Return a function that recognises files of these names in a directory or up to two below,
    with no whole model beside or above.
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
    """Recognise a file of GGUF, or a directory that holds some and no files of another format."""
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
        "DeepSpeed's shards: `lca import SOURCE DIR` puts those of every step together, in "
        "float32, and makes a directory that this reads.",
        is_imported=True,
    ),
    Unreadable(
        "Megatron shards",
        _sharded(
            "mp_rank_*/model_optim_rng.pt", "mp_rank_*/model_rng.pt", "mp_rank_*/distrib_optim.pt"
        ),
        "Megatron's shards, which only Megatron puts together: convert every iteration with its "
        "tools/checkpoint/convert.py, and import or read the result.",
    ),
    Unreadable(
        "torch.distributed.checkpoint shards",
        _sharded("*.distcp"),
        "shards of torch.distributed.checkpoint: `lca import SOURCE DIR` puts those of every step "
        "together, and makes a directory that this reads.",
        is_imported=True,
    ),
    Unreadable(
        "GGUF",
        _is_gguf,
        GGUF,
    ),
)


def refuse_unreadable(place: Path) -> None:
    """Refuse a directory, or a file, that only another program can read.

    Raises:
        InputError: with what it holds and how to make checkpoints of it.
    """
    for layout in UNREADABLE:
        if layout.recognises(place):
            raise InputError(f"{place} holds {layout.words}")


# --- numbers in names -----------------------------------------------------------------------------


def step_in_name(name: str) -> int | None:
    """Return the training step a file or directory name states, or None: never just the last number
    in it.

    >>> step_in_name("checkpoint-30000step"), step_in_name("step_1e5"), step_in_name("model-00001-of-00004")
    (30000, None, None)
    """
    numbers = {int(number) for _, number in _NUMBER.findall(name) if len(number) < 19}
    return numbers.pop() if len(numbers) == 1 else None


def says_step(name: str) -> bool:
    """Tell whether a name calls its number a step or an iteration, and not merely that of a
    checkpoint.

    >>> says_step("epoch=1-step=20"), says_step("checkpoint-20.pth")
    (True, False)
    """
    return any(_SAYS_STEP.match(word) for word, _ in _NUMBER.findall(name))


def states_epoch(name: str) -> bool:
    """Tell whether a name states an epoch."""
    return _SAYS_EPOCH.search(name) is not None


def pattern_of(name: str) -> str:
    """Return a `--pattern` for names such as this one, by the word that stands before its number.

    >>> pattern_of("checkpoint_0003.pth.tar"), pattern_of("net_epoch_12.pth")
    ('checkpoint_(?P<step>\\\\d+)', 'epoch_(?P<step>\\\\d+)')
    """
    word = next((word for word, _ in _NUMBER.findall(name)), None)
    epoch = _SAYS_EPOCH.search(name)
    return f"{word or (epoch[1] if epoch else '')}(?P<step>\\d+)"


def count_epochs(pairs: Sequence[tuple[int, int]]) -> bool:
    """Tell whether numbers rise one by one with epochs, where the pairs are (number in the name,
    epoch in the file).

    Some programs save the number of the epoch that is done and some that of the next: only the
    difference is compared. Names that count steps rise by the steps of an epoch, or not at all
    within one.

    >>> count_epochs([(0, 1), (1, 2), (4, 5)]), count_epochs([(0, 0), (10, 1)]), count_epochs([(0, 0), (1, 0)])
    (True, False, False)
    """
    return (
        len({epoch for _, epoch in pairs}) > 1
        and len({number - epoch for number, epoch in pairs}) == 1
    )


def refuse_epochs(names: Mapping[str, int | None]) -> None:
    """Refuse names whose numbers count epochs.

    Args:
        names: name → the epoch its file holds, None where it holds none.

    Raises:
        InputError: with the `--pattern` that says that epochs are meant.
    """
    inside = sorted(epoch for epoch in names.values() if epoch is not None)
    in_files = f" (the files hold epoch {few([*map(str, inside)])})" if inside else ""
    numbered = [name for name in names if step_in_name(name) is not None or states_epoch(name)]
    what = (
        f"cannot tell the training step of {few([*names])}: an epoch is stated and no training "
        "step, and one segment would span all steps of an epoch"
        if step_in_name(numbered[0]) is None
        else f"{few([*names])}: the number in the name is the epoch{in_files} and not a training "
        f"step, and one segment would span all "
        "steps of an epoch"
    )
    raise InputError(
        f"{what}. Where that is meant, name the number with --pattern '{pattern_of(numbered[0])}'; "
        "what it does not match is left out."
    )


def epochs_are_meant(names: str) -> str:
    """Return the note for numbers that the user named although they count epochs.

    Args:
        names: what names them: `--pattern` with its argument, or a place with `{step}` in it.
    """
    return (
        f"the numbers {names} names are the epochs the files hold: every segment "
        "spans all steps of an epoch or more, and the straight line between its ends is not the "
        "path that training took"
    )


def both_count(names: Sequence[str]) -> str:
    """Return the note for names that say step where the files hold the same number as their
    epoch.
    """
    return (
        f"{few(names)}: the number is taken as the training step, as the name says, and the files "
        "hold it as their epoch too. Where an epoch has several steps, a segment spans all of them"
    )


def refuse_counted_saves(entries: Sequence[Path]) -> None:
    """Refuse directories of accelerate's `save_state` whose numbers count saves: `checkpoint_0`,
    `checkpoint_1`, ….

    With numbers that are not consecutive they are the caller's own, and are training steps as far
    as anyone can tell.

    Raises:
        InputError: with the `--pattern` that says that the saves are meant.
    """
    of_accelerate = [
        entry
        for entry in entries
        if _OF_ACCELERATE.fullmatch(entry.name) and any(entry.glob("random_states_*.pkl"))
    ]
    numbers = sorted(int(entry.name.partition("_")[2]) for entry in of_accelerate)
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        raise InputError(
            f"{few([entry.name for entry in of_accelerate])}: accelerate numbers what save_state "
            "writes by counting its saves, so the number is no training step, and one segment "
            "would span all steps between two saves. Where that is meant, name the number with "
            "--pattern 'checkpoint_(?P<step>\\d+)'; else rename the directories to step_N, N the "
            "step of the optimiser."
        )


def several_namings(names: Sequence[str]) -> list[str]:
    """Return a note where names differ in more than their numbers, as those of two trainings do.

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
        f"names are of {len(kinds)} kinds: {shown}. They are taken as checkpoints of one training; "
        "where they are of several, choose one with --pattern"
    ]
