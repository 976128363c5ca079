"""Texts made safe to show: the same signs are taken out wherever a text goes, and no other is
touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from lca_posthoc.base.text import is_storable, safe, safe_in_figure, safe_in_page, without_places
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
