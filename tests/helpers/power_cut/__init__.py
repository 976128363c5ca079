"""A file system that loses what was not flushed: what a power cut leaves, from a seed."""
