"""Encode names of tensors and losses as safe, reversible file names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from urllib.parse import quote

_LONGEST = 120
_TROUBLE = {"", ".", "..", "zarr.json", "c", "step", "step_end"}


def _plain(name: str) -> str:
    key = quote(name, safe="").replace("~", "%7E")
    if key in _TROUBLE or key.startswith("__"):
        key = "".join(f"%{byte:02X}" for byte in name.encode()) or "%"
    return key


def encode_all(names: Iterable[str], in_use: Iterable[str] = ()) -> dict[str, str]:
    """Return a key for each name: percent-encoded, with a hash if it is too long or differs from
    another only by case.

    Args:
        names: to be encoded.
        in_use: existing keys.

    >>> encode_all(["fc/1.weight", "A", "a"])
    {'fc/1.weight': 'fc%2F1.weight', 'A': 'A-559aead08264', 'a': 'a-ca978112ca1b'}
    """
    listed = list(names)
    folded = [key.casefold() for key in (*map(_plain, listed), *in_use)]
    keys = {}
    for name in listed:
        key = _plain(name)
        if len(key) > _LONGEST or folded.count(key.casefold()) > 1:
            key = f"{re.sub('%[0-9A-F]?$', '', key[:_LONGEST])}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        keys[name] = key
    return keys
