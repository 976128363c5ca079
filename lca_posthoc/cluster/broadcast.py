"""Hold bytes that were sent to this process for later specs."""

from __future__ import annotations

_DELIVERED: dict[str, bytes] = {}


def take_in(key: str, data: bytes) -> None:
    """Keep bytes under a key.

    Args:
        key: names them.
        data: the bytes.
    """
    _DELIVERED[key] = data


def drop(key: str) -> None:
    """Forget the bytes under a key."""
    _DELIVERED.pop(key, None)


def delivered(key: str) -> bytes:
    """Return the bytes under a key."""
    return _DELIVERED[key]
