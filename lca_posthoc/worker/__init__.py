"""What runs on a worker: describe a task, probe it, measure it, replay one span. Each takes a JSON-like spec and returns one."""

from .measure import measure
from .probe import describe, probe
from .replay import replay_span

__all__ = ["describe", "measure", "probe", "replay_span"]
