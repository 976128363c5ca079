"""From a run to small labelled results: one file per analysis."""

from .curve import curve
from .distribution import distribution
from .helping import helping
from .layers import layers
from .summary import summary

__all__ = ["curve", "distribution", "helping", "layers", "summary"]
