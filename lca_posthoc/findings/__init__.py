"""From a run to small labelled results: one file per analysis."""

from .compare import compare
from .curve import curve
from .distribution import distribution
from .helping import helping
from .layers import layers
from .peaks import peaks
from .summary import summary

__all__ = ["compare", "curve", "distribution", "helping", "layers", "peaks", "summary"]
