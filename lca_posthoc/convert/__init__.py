"""Checkpoints in other formats, made into the series of safetensors files that `lca run` reads."""

from .write import Imported, convert

__all__ = ["Imported", "convert"]
