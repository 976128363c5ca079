"""What runs on a worker: describe a task, probe it, measure it, replay one span. Each takes a JSON-like spec and returns one."""

from .checks import describe, probe
from .costs import measure
from .spans import SAMPLED, replay_span

__all__ = ["SAMPLED", "describe", "measure", "probe", "replay_span"]
