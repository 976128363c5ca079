"""Loss Change Allocation after training: find out from saved checkpoints which weights did the
learning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import findings as findings
    from . import plots as plots
    from .checkpoints.trajectory import open_trajectory as open_trajectory
    from .numerics.objective import Draws as Draws
    from .recording import Recorder as Recorder
    from .replay.run import run as run
    from .results import Run as Run
    from .results import open_run as open_run
    from .tasks.task import Loss as Loss
    from .tasks.task import Task as Task

    __version__: str

_HOMES = {
    "Draws": ".numerics.objective",
    "Loss": ".tasks.task",
    "Recorder": ".recording",
    "Run": ".results",
    "Task": ".tasks.task",
    "open_run": ".results",
    "open_trajectory": ".checkpoints.trajectory",
    "run": ".replay.run",
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
    # Import lazily, so that `import lca_posthoc` and `lca --help` load neither torch nor zarr.
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name in ("findings", "plots"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
