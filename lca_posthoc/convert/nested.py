"""Find the model's state dict in the contents of a file, whatever surrounds it, and never mistake
an optimiser's state for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, few
from .standins import class_of, holds_tensors_inside, is_left_out

_WITHIN = ("state_dict", "model", "model_state_dict", "module")
_OPTIMISER = re.compile(r"(^|_)(optim(izer|iser)?s?|opt)(_states?)?(_dicts?)?$", re.IGNORECASE)
_SLOTS = frozenset(
    (
        *(
            "step",
            "exp_avg",
            "exp_avg_sq",
            "max_exp_avg_sq",
            "exp_inf",
            "mu",
            "mu_product",
            "momentum_buffer",
            "momentum",
        ),
        *(
            "square_avg",
            "grad_avg",
            "acc_delta",
            "sum",
            "ax",
            "eta",
            "prev",
            "step_size",
            "slow_buffer",
            "master_param",
        ),
        *(
            "exp_avg_sq_row",
            "exp_avg_sq_col",
            "RMS",
            "state1",
            "state2",
            "row_momentum",
            "n_avg",
            "v",
            "m",
        ),
    )
)
_DEEPEST = 8
Level = Mapping[Any, object]


def state_dict(
    saved: object, file: Path, key: str | None
) -> tuple[Mapping[str, object], list[Level], list[str]]:
    """Find the state dict in a file.

    It is the one under `--key`, a dotted path; else the only known entry of the file; else the only
    state dict anywhere in it; else the file itself.

    Args:
        saved: contents of the file.
        file: path of the file, for messages.
        key: the argument of `--key`, or None.

    Returns:
        The state dict, the mappings that contain it, from the outside in, and notes on others that
        were not chosen.

    Raises:
        InputError: if there is none, or several are possible; the message names every possible key.
    """
    if is_left_out(saved):
        raise InputError(
            f"{file} holds an object of {class_of(saved)}, which is not loaded: that could run any "
            "code. Save model.state_dict()."
        )
    if not isinstance(saved, Mapping):
        raise InputError(
            f"{file} holds a {type(saved).__name__}, not a state dict. Save model.state_dict()."
        )
    places = dict(_places(saved))
    if key is not None:
        trails = [trail for trail in _at(saved, key) if _holds_tensors(trail[-1])]
        if len(trails) != 1:
            problem = "holds no tensors there" if not trails else "holds two state dicts there"
            raise InputError(f"--key {key!r}: {file} {problem}. {_entries(saved, list(places))}")
        return trails[0][-1], trails[0][:-1], []
    known = [name for name in _WITHIN if name in places and len(places[name]) == 1]
    _refuse_unread_model(saved, file, places, known)
    if len(known) == 1:
        others = [
            path for path in places if path != known[0] and not _only_scalars(places[path][-1])
        ]
        also = [
            f"took entry {known[0]!r} of every checkpoint; tensors are also in "
            f"{few([*map(repr, others)], 8)}, which --key takes instead"
        ] * bool(others)
        return places[known[0]][-1], [], also
    if not places and _holds_tensors(saved):
        return saved, [], []
    models = [path for path, trail in places.items() if not _only_scalars(trail[-1])]
    if not known and len(models) == 1 and not _has_numbers_beside(saved, places[models[0]]):
        *around, model = places[models[0]]
        return model, around, []
    if not places:
        raise InputError(f"{file} holds no state dict. {_entries(saved, [])}")
    raise InputError(
        f"which state dict of {file} is meant is not clear. {_entries(saved, list(places))}"
    )


def _refuse_unread_model(
    saved: Level, file: Path, places: Mapping[str, Sequence[Level]], known: Sequence[str]
) -> None:
    """Check that no skipped object with tensors may be the model itself.

    Raises:
        InputError: if there is one.
    """
    around = [saved, *(level for trail in places.values() for level in trail[:-1])]
    unread = [
        name for level in around for name, value in level.items() if holds_tensors_inside(value)
    ]
    if places and unread and (not known or any(name in _WITHIN for name in unread)):
        raise InputError(
            f"which state dict of {file} is meant is not clear. {_entries(saved, list(places))}"
        )


def _holds_tensors(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and not is_left_out(value)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(entry, torch.Tensor) for entry in value.values())
    )


def _only_scalars(state: Level) -> bool:
    return all(tensor.numel() <= 1 for tensor in state.values() if isinstance(tensor, torch.Tensor))


def _has_numbers_beside(saved: Level, trail: Sequence[Level]) -> bool:
    """Return whether tensors of more than one number lie beside the state dict, on its own level or
    above.
    """
    return any(not _only_scalars(level) for level in [saved, *trail[:-1]])


def _is_optimiser(name: str, value: Level) -> bool:
    """Return whether a mapping is an optimiser's state, by its keys, or by its name if the keys are
    inconclusive.
    """
    if "param_groups" in value or (_OPTIMISER.search(name) and not _holds_tensors(value)):
        return True
    names = [key for key in value if isinstance(key, str)]
    if names and all(key.startswith(("state.", "param_groups.")) for key in names):
        return True  # torch.distributed.checkpoint flattened it
    return bool(names) and name not in _WITHIN and _SLOTS.issuperset(names)


def _places(
    value: Level, prefix: str = "", trail: tuple[Level, ...] = ()
) -> Iterator[tuple[str, list[Level]]]:
    """Yield the dotted path of every state dict in nested mappings, with the mappings along the
    path, the state dict last.
    """
    for name, inner in value.items():
        if not isinstance(name, str) or not isinstance(inner, Mapping) or is_left_out(inner):
            continue
        if name.rpartition(".")[2] == "_extra_state" or _is_optimiser(name, inner):
            continue
        if _holds_tensors(inner) and not (
            _only_scalars(inner) and any(isinstance(entry, Mapping) for entry in inner.values())
        ):
            yield prefix + name, [*trail, inner]
        elif len(trail) < _DEEPEST:
            yield from _places(inner, f"{prefix}{name}.", (*trail, inner))


def _at(value: Level, key: str) -> Iterator[list[Level]]:
    """Yield the mappings along every reading of a dotted key: as one name, or as names of levels."""
    for end in [index for index, letter in enumerate(key) if letter == "."] + [len(key)]:
        inner = value.get(key[:end])
        if not isinstance(inner, Mapping):
            continue
        if end == len(key):
            yield [inner]
        else:
            yield from ([inner, *rest] for rest in _at(inner, key[end + 1 :]))


def _entries(saved: Level, paths: Sequence[str]) -> str:
    keys = few([repr(name)[:80] for name in saved], 8) or "none"
    objects = [
        f"{name!r} is an object of {class_of(value)}"
        for name, value in saved.items()
        if holds_tensors_inside(value)
    ]
    whole = f"; {few(objects)} and is not loaded" if objects else ""
    if not paths:
        return f"Its keys are {keys}, none of them with tensors in it{whole}."
    return (
        f"Its keys are {keys}; tensors are in {few([repr(path)[:200] for path in paths], 20)}: "
        f"name one with --key{whole}."
    )
