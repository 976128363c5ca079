"""Format text for people: counts, times, suggestions, names cut in the middle, text that is safe to
show.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from rich.cells import cell_len

_ROUNDS = 3
_ENDS = 8  # cells kept at the ends of names that differ in their middle
_CONTROLS = r"\x00-\x1f\x7f-\x9f"
_HALVES = r"\ud800-\udfff"  # lone surrogates, which no encoding can store
# every character that changes the direction of text
_TURNS = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_LINE_ENDS = r"\u2028\u2029"
_UNSAFE = re.compile(f"[{_CONTROLS}{_HALVES}{_TURNS}{_LINE_ENDS}]")
_LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_UNSTORABLE = re.compile(f"[{_CONTROLS}{_HALVES}]")
_ADDRESS = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://[^\s'\"<>]*")
# the directories of an absolute path, on any system
_DIRECTORIES = re.compile(
    r"(?:(?<![\w.…/:~-])(?:~[\w.-]*)?/|\b[A-Za-z]:\\)(?:[^\s/\\'\"<>]+[/\\])*(?=[^\s/])"
)


def safe(text: str) -> str:
    """Replace characters that control a terminal by "?"; write a lone surrogate as its number.

    >>> safe("a\\x1b[31mb")
    'a?[31mb'
    """
    return _UNSAFE.sub("?", text.encode("utf-8", "backslashreplace").decode())


def safe_in_page(text: str) -> str:
    """Replace each line break by an arrow and every other unsafe character by U+FFFD.

    The caller must still escape markup.

    >>> safe_in_page("a\\x1b[31mb\\n")
    'a\N{REPLACEMENT CHARACTER}[31mb↵'
    """
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\n", _LINE_END))


def safe_in_figure(text: str) -> str:
    r"""Escape a text so that matplotlib draws it letter by letter.

    Dollar signs start no formula, a leading underscore hides nothing from a legend, and an arrow
    replaces each line break.

    >>> safe_in_figure("a$b$\x1b\n")
    'a\\$b\\$?↵'
    """
    text = _UNSAFE.sub("?", text.replace("\n", _LINE_END)).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def quoted(argument: object) -> str:
    """Quote an argument that a person will copy into a shell, and make it safe to show.

    >>> quoted("my runs/a.lca"), quoted("a.lca")
    ("'my runs/a.lca'", 'a.lca')
    """
    return safe(shlex.quote(str(argument)))


def without_places(text: str) -> str:
    """Remove directories and addresses from a text, because they may hold user names and passwords.

    Keep the last name of a path and the scheme of an address.

    >>> without_places("/home/ada/ck/step_1.pt: see https://ada:word@host/x?key=1, or runs/a.lca")
    '…/step_1.pt: see https://… or runs/a.lca'
    """
    return _DIRECTORIES.sub("…/", _ADDRESS.sub(r"\1://…", text))


def is_storable(text: str) -> bool:
    """Return whether every text format can store a text unchanged: no control characters, no lone
    surrogates.

    >>> is_storable("größe"), is_storable("a\\x00b")
    (True, False)
    """
    return _UNSTORABLE.search(text) is None


def count(value: float, one: str = "", more: str = "") -> str:
    """Format a whole number together with the word for what it counts.

    >>> count(1, "step"), count(1234, "step"), count(2, "loss", "losses")
    ('1 step', '1,234 steps', '2 losses')

    Args:
        value: the number; a fraction is cut off.
        one: the singular; "" formats the number alone.
        more: the plural; the singular and "s" by default.
    """
    shown = f"{int(value):,}"
    return f"{shown} {one if int(value) == 1 else more or one + 's'}" if one else shown


def duration(seconds: float) -> str:
    """Format a time in at most two units.

    >>> [duration(seconds) for seconds in (0.0123, 3.21, 48.4, 125, 4800, 200_000)]
    ['12 ms', '3.2 s', '48 s', '2 min 5 s', '1 h 20 min', '2 d 8 h']
    """
    for unit, size in (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        number = seconds / size
        if number < (59.5 if unit == "s" else 999.5) and seconds > 0:
            return f"{number:.2g} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
    rest = _rounded(seconds)
    words = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        amount, rest = divmod(rest, size)
        if amount:
            words.append(f"{amount} {unit}")
    return " ".join(words) or "0 s"


def _rounded(seconds: float) -> int:
    """Round to whole seconds; from ten minutes on to whole minutes, from a day on to whole hours."""
    for below, step in ((600, 1), (86_400, 60)):
        if (rounded := round(seconds / step) * step) < below:
            return rounded
    return round(seconds / 3600) * 3600


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that suggests the nearest known word, with a leading blank; "" if none is
    near.

    >>> did_you_mean("layrs", ["layers", "units"]), did_you_mean("nothing", ["layers", "units"])
    (" Did you mean 'layers'?", '')

    Args:
        word: what was given.
        known: the words that are valid.
    """
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def no_loss(place: object, loss: str, known: Iterable[str]) -> str:
    """Return the error message for a loss that a run does not have.

    >>> no_loss("a.lca", "trian", ["train"])
    "a.lca has no loss 'trian'; it has 'train'. Did you mean 'train'?"

    Args:
        place: the run, or whatever else has losses, as the message names it.
        loss: the name that was asked for.
        known: the names that exist.
    """
    names = list(known)
    listed = ", ".join(map(repr, names)) or "none"
    return f"{place} has no loss {loss!r}; it has {listed}.{did_you_mean(loss, names)}"


def shorten(texts: Sequence[str], width: int, dots: str = "…") -> list[str]:
    """Cut names in the middle so that they fit; where names differ only in the middle, keep the
    difference.

    >>> shorten(["encoder.layers.0.attention.weight", "encoder.layers.11.attention.weight", "bias"], 20)
    ['encoder.l…0…n.weight', 'encoder.…11…n.weight', 'bias']

    Args:
        texts: the names.
        width: the most terminal cells of one result.
        dots: the mark for each cut.

    Returns:
        One short name for each text, in the same order.
    """
    cut = {text: _cut(text, width, dots) for text in texts}
    for _ in range(_ROUNDS):  # a new short name may equal the short name of another text
        groups = _colliding(cut)
        if not groups:
            break
        for group in groups:
            cut |= _telling(group, width, dots)
    if _colliding(cut):
        together = cut | _telling([text for text in cut if cell_len(text) > width], width, dots)
        cut = max(cut, together, key=lambda shown: len({*shown.values()}))
    return [cut[text] for text in texts]


def _colliding(cut: dict[str, str]) -> list[list[str]]:
    """Return the groups of names whose short forms are equal."""
    alike: dict[str, list[str]] = {}
    for text, short in cut.items():
        alike.setdefault(short, []).append(text)
    return [group for group in alike.values() if len(group) > 1]


def _cut(text: str, width: int, dots: str) -> str:
    """Return a name cut in the middle."""
    if cell_len(text) <= width:
        return text
    room = max(0, width - cell_len(dots))
    return _head(text, room - room // 2) + dots + _tail(text, room // 2)


def _telling(group: list[str], width: int, dots: str) -> dict[str, str]:
    """Shorten names that are alike at both ends so that as much of their middles as possible
    remains.
    """
    before = _alike(group)
    after = _alike([text[before:][::-1] for text in group])
    room = width - 2 * cell_len(dots)
    ends = min(_ENDS, room // 3)
    if not before + after or room - ends < 1:
        return {}
    between = [text[before : len(text) - after] for text in group]
    told_apart = {}
    for text, middle in zip(group, shorten(between, room - ends, dots), strict=True):
        room_left = room - cell_len(middle)
        tail = _tail(text[len(text) - after :], room_left // 2) if after else ""
        head = _head(text[:before], room_left - cell_len(tail))
        told_apart[text] = head + dots + middle + dots + tail
    return told_apart


def _alike(texts: list[str]) -> int:
    """Return the length of the longest common prefix."""
    return sum(
        1 for _ in itertools.takewhile(lambda signs: len({*signs}) == 1, zip(*texts, strict=False))
    )


def _head(text: str, width: int) -> str:
    """Return the longest prefix of at most `width` cells, with the combining marks of its last
    character.
    """
    end, cells = 0, 0
    while end < len(text) and cells + cell_len(text[end]) <= width:
        cells += cell_len(text[end])
        end += 1
    return text[:end]


def _tail(text: str, width: int) -> str:
    """Return the longest suffix of at most `width` cells that does not begin with a combining mark."""
    start, cells = len(text), 0
    while start and cells + cell_len(text[start - 1]) <= width:
        start -= 1
        cells += cell_len(text[start])
    while start < len(text) and cell_len(text[start]) == 0:
        start += 1
    return text[start:]
