"""Write one self-contained page of a run's findings, which opens offline."""

from .page import MOST_BYTES, write_report

__all__ = ["MOST_BYTES", "write_report"]
