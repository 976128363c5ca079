"""From a run to small labelled results: one file per analysis."""

from .summary import summary

__all__ = ["summary"]
