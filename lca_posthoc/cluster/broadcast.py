"""Bytes that were put into this process for the specs that come after them."""

from __future__ import annotations

_DELIVERED: dict[str, bytes] = {}


def take_in(key: str, data: bytes) -> None:
    """Keep bytes under a key."""
    _DELIVERED[key] = data


def drop(key: str) -> None:
    """Forget the bytes under a key."""
    _DELIVERED.pop(key, None)


def delivered(key: str) -> bytes:
    """Return the bytes under a key."""
    return _DELIVERED[key]
