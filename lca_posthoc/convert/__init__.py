"""Convert checkpoints in other formats to the series of safetensors files that `lca run` reads."""

from .write import Imported, convert

__all__ = ["Imported", "convert"]
