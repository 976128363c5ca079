"""Shorten names of layers and tensors for figures and for the report, keeping them distinct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial


def shorten(names: Sequence[str], most: int = 26) -> list[str]:
    """Cut names in the middle to about `most` characters; each stays distinct.

    >>> shorten(["h.0.attention.output.weight", "h.1.attention.output.weight", "wte.weight"], 20)
    ['h.0.attent…ut.weight', 'h.1.attent…ut.weight', 'wte.weight']

    Args:
        names: to cut.
        most: characters of a name.
    """
    if all(len(name) <= most for name in names):
        return list(names)
    names = _without_common_start(names)
    whole = len(set(names))
    for width in range(most, max(map(len, names))):
        for head in (0.5, 0.7, 0.3):  # the difference may lie before or after the middle
            cut = [_middle(name, width, head) for name in names]
            if len(set(cut)) == whole:
                return cut
    return list(names)


def _window(name: str, most: int, start: int) -> str:
    start = min(start, len(name) - most + 1)
    return f"…{name[start : start + most - 1]}"


def _last_parts(name: str, most: int) -> str:
    """Return the last parts of a dotted name that fit after "…", or a cut in the middle if none
    does.
    """
    parts = name.split(".")
    ends = (f"…{'.'.join(parts[first:])}" for first in range(1, len(parts)))
    return next((end for end in ends if len(end) <= most), _middle(name, most, 0.5))


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Replace the parts that all names start with by "…"; the last two parts of each stay.

    >>> _without_common_start(["net.body.0.conv", "net.body.1.norm"])
    ['…0.conv', '…1.norm']
    """
    parts = [name.split(".") for name in names]
    # a single name shares nothing with others
    least = min(map(len, parts)) - 2 if len(set(names)) > 1 else 0
    head = next(
        (index for index in range(least) if len({split[index] for split in parts}) > 1),
        max(0, least),
    )
    return [
        f"…{'.'.join(split[head:])}" if head else name
        for split, name in zip(parts, names, strict=True)
    ]


def _middle(name: str, most: int, head: float) -> str:
    if len(name) <= most:
        return name
    before = round((most - 1) * head)
    return f"{name[:before].rstrip('.')}…{name[len(name) - (most - 1 - before) :].lstrip('.')}"


def fitting(names: Sequence[str], rooms: Sequence[int]) -> list[str]:
    """Cut each name to its number of characters: first the parts that all start and end with, then
    the side that keeps most names distinct.

    >>> fitting(["net.stage.0.conv.weight", "net.stage.1.conv.weight"], [6, 6])
    ['0', '1']

    Args:
        names: to cut.
        rooms: the characters for each name.
    """
    parts = [name.split(".") for name in names]
    least = min(map(len, parts), default=1)
    head = next((index for index in range(least) if len({split[index] for split in parts}) > 1), 0)
    tail = next(
        (index for index in range(least - head) if len({split[-1 - index] for split in parts}) > 1),
        0,
    )
    bare = [".".join(split[head : len(split) - tail]) for split in parts]
    if all(len(name) <= room for name, room in zip(names, rooms, strict=True)):
        return list(names)

    def cut(how: Callable[[str, int], str]) -> list[str]:
        return [
            name if len(name) <= room else how(name, max(2, room))
            for name, room in zip(bare, rooms, strict=True)
        ]

    cuts = [
        cut(_last_parts),
        *(cut(partial(_middle, head=head)) for head in (0.5, 0.0, 0.25, 0.75, 1.0)),
    ]
    cuts += [cut(partial(_window, start=start)) for start in range(max(map(len, bare), default=0))]
    return max(cuts, key=lambda cut: len(set(cut)))
