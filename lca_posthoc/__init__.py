"""Loss Change Allocation after training: which weights did the learning, from saved checkpoints of
every iterate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import findings as findings
    from . import plots as plots
    from .objective import Draws as Draws
    from .recorder import Recorder as Recorder
    from .replay import run as run
    from .store import Run as Run
    from .store import open_run as open_run
    from .task import Loss as Loss
    from .task import Task as Task
    from .trajectory import open_trajectory as open_trajectory

__version__ = "0.1.0"

_HOMES = {
    "Draws": ".objective",
    "Loss": ".task",
    "Recorder": ".recorder",
    "Run": ".store",
    "Task": ".task",
    "open_run": ".store",
    "open_trajectory": ".trajectory",
    "run": ".replay",
}
__all__ = [
    "Draws",
    "Loss",
    "Recorder",
    "Run",
    "Task",
    "findings",
    "open_run",
    "open_trajectory",
    "plots",
    "run",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Lazily, so that `import lca_posthoc` and `lca --help` load neither torch nor zarr.
    if name in ("findings", "plots"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
