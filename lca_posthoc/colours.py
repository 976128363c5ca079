"""Colours with a meaning, the same in pictures and in the report; plain data."""

from __future__ import annotations

HELPING = "#0f8b8d"
HURTING = "#d1495b"
NEUTRAL = "#f5f5f0"
NEUTRAL_DARK = "#1e1e1e"
