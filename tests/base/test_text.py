"""Texts made safe to show: the same signs are taken out wherever a text goes, and no other is
touched; and times in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from lca_posthoc.base.text import (
    duration,
    is_storable,
    safe,
    safe_in_figure,
    safe_in_page,
    without_places,
)
from lca_posthoc.report.content import clean
from tests.helpers.cli import UNSAFE, steering

PLACES: dict[str, Callable[[str], str]] = {
    "a terminal": safe,
    "a page": safe_in_page,
    "a report": clean,
    "a figure": safe_in_figure,
}
WORDS = (
    "größe",
    "e\u0301",
    "👩\u200d🔬",
    "می\u200cشود",
    "שלום",
    "layer.0[1, 2]",
    "\u200bzero",
    "a b",
    "→ −1 ≤ 2",
    "",
)
EVERY_SIGN = [chr(number) for number in range(0x110000)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sign", UNSAFE)
def test_no_sign_that_steers_is_shown(sign: str, place: str) -> None:
    assert steering(sign)
    shown = PLACES[place](f"a{sign}b")
    assert steering(shown) == set()
    assert shown.startswith("a")
    assert shown.endswith("b")
    assert len(shown) >= 3  # something stands for what was there


@pytest.mark.parametrize("place", PLACES)
def test_the_unsafe_signs_are_those_of_unicode(place: str) -> None:
    changed = {sign for sign in EVERY_SIGN if PLACES[place](f"a{sign}") != f"a{sign}"}
    assert changed - {"$"} == steering("".join(EVERY_SIGN))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("word", WORDS)
def test_words_are_shown_as_they_are(word: str, place: str) -> None:
    assert PLACES[place](word) == word


def test_half_a_pair_of_surrogates_can_be_told_from_another_in_a_terminal() -> None:
    assert safe("r\udcff.lca") == "r\\udcff.lca"


@pytest.mark.parametrize("sign", ["\x00", "\x1f", "\x7f", "\x80", "\x9f", "\n", "\udfff"])
def test_what_no_file_holds_as_it_is(sign: str) -> None:
    assert not is_storable(f"a{sign}b")
    assert is_storable(json.dumps(sign))


@pytest.mark.parametrize("word", [*WORDS, "\u202eevil", "\u200fright", "two\u2028lines"])
def test_what_a_file_holds_as_it_is(word: str) -> None:
    assert is_storable(word)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/run.lca", "…/run.lca"),
        ("'~/ck/a b'", "'…/a b'"),
        ("~ada/ck", "…/ck"),
        (r"C:\Users\Ada\ck: missing", "…/ck: missing"),
        ("s3://key:word@bucket/run.lca", "s3://…"),
        ("0 (tcp://127.0.0.1:44903), 2", "0 (tcp://… 2"),
        ("/data/x", "…/x"),
        # what names no place
        ("3 / 10 segments/s, runs/a.lca, ../b", "3 / 10 segments/s, runs/a.lca, ../b"),
        (r"step_(?P<step>\d+)\.pt", r"step_(?P<step>\d+)\.pt"),
    ],
)
def test_places_are_left_out_of_a_text(text: str, shown: str) -> None:
    assert without_places(text) == shown


# --- times ----------------------------------------------------------------------------------------

SECONDS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (7.3e-5, "73 µs"),
        (0.0999, "100 ms"),
        (0.9996, "1 s"),
        (3.2, "3.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (62, "1 min 2 s"),
        (754, "13 min"),
        (3599, "1 h"),
        (4800, "1 h 20 min"),
        (86_399, "1 d"),
        (90_000, "1 d 1 h"),
        (8_640_000, "100 d"),
    ],
)
def test_a_time_is_in_units_people_use(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize("exponent", range(-60, 80))
def test_a_time_is_shown_within_a_twentieth_in_at_most_two_units(exponent: int) -> None:
    seconds = 10 ** (exponent / 10)
    words = duration(seconds).split()
    parts = [
        float(number) * SECONDS[unit] for number, unit in zip(words[::2], words[1::2], strict=True)
    ]
    assert len(parts) <= 2
    assert sum(parts) == pytest.approx(seconds, rel=0.05)
