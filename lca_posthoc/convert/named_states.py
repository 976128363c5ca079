"""Convert optimiser states that name their tensors, as torch.distributed.checkpoint saves them, to
states that number them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def numbered(state: Mapping[str, object]) -> dict[str, object] | None:
    """Convert an optimiser's state to numbered tensors, with `param_names` in its groups; return
    None if it is not such a state.

    The state has `state` and `param_groups` that contain names, or is flat: `state.NAME.SLOT` and
    `param_groups.NAME.SETTING`.

    >>> numbered({"state.fc.weight.step": 3, "param_groups.fc.weight.lr": 0.1})
    {'state': {0: {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': [0], 'param_names': ['fc.weight']}]}
    """
    # an empty entry, such as the state before the first step, is not saved at all
    slots, groups = state.get("state", {}), state.get("param_groups")
    if isinstance(slots, Mapping) and isinstance(groups, list):
        return _numbered(slots, groups)
    flat = _unflattened(state)
    return None if flat is None else _numbered(*flat)


def _numbered(slots: Mapping[Any, object], groups: list[object]) -> dict[str, object] | None:
    numbers: dict[object, int] = {}
    rewritten = []
    for group in groups:
        names = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(group, Mapping) or not isinstance(names, list):
            return None
        if all(isinstance(name, int) for name in names):
            # already numbered, but saved as strings where they are keys
            numbers |= {str(name): name for name in names}
            rewritten.append({**group})
            continue
        places = [numbers.setdefault(name, len(numbers)) for name in names]
        rewritten.append({**group, "params": places, "param_names": names})
    states = {numbers[name]: slot for name, slot in slots.items() if name in numbers}
    return {"state": states, "param_groups": rewritten}


def _unflattened(
    state: Mapping[str, object],
) -> tuple[Mapping[str, object], list[object]] | None:
    """Return a flat state's slots by name, and its groups, each of tensors with equal settings."""
    tables: dict[str, dict[str, dict[str, object]]] = {"state": {}, "param_groups": {}}
    for key, value in state.items():
        kind, _, rest = key.partition(".")
        name, dot, last = rest.rpartition(".")
        if kind not in tables or not dot:
            return None
        tables[kind].setdefault(name, {})[last] = value
    groups: dict[str, dict[str, object]] = {}
    members: dict[str, list[str]] = {}
    for name, settings in tables["param_groups"].items():
        alike = repr(sorted(settings.items()))
        groups.setdefault(alike, settings)
        members.setdefault(alike, []).append(name)
    return tables["state"], [
        {**settings, "params": members[alike]} for alike, settings in groups.items()
    ]
