"""Describe the software and the machine of this process, as a bug report needs them."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil

from ..errors import amount

_PACKAGE = "lca_posthoc"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_NAME = re.compile(r"[\w.-]+")
_OPTIONAL = re.compile(r"; .*\bextra ==")


def package() -> dict[str, str]:
    """Return the version of this package."""
    return {_PACKAGE: version(_PACKAGE)}


def dependencies() -> dict[str, str]:
    """Return the version of each required package by name; "missing" if it is not installed."""
    return {name: _installed(name) or "missing" for name in _named(optional=False)}


def additions() -> dict[str, str]:
    """Return the versions of the installed optional packages by name."""
    releases = {name: _installed(name) for name in _named(optional=True)}
    return {name: release for name, release in releases.items() if release is not None}


def _named(*, optional: bool) -> list[str]:
    """Return the required or the optional packages that this package's metadata name, in order."""
    names = dict[str, None]()
    for requirement in requires(_PACKAGE) or ():
        name = _NAME.match(requirement)
        if name is not None and bool(_OPTIONAL.search(requirement)) == optional:
            names[name.group()] = None
    return [*names]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def system() -> dict[str, str]:
    """Return the versions of Python and of the operating system, the number of processors and the
    memory.
    """
    libc = " ".join(platform.libc_ver())
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()} {libc}".strip(),
        "processors": str(os.cpu_count()),
        "memory": amount(psutil.virtual_memory().total),
    }


def devices() -> dict[str, str]:
    """Describe what torch computes on: CUDA version, devices and threads. If torch cannot be
    imported, say why.
    """
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return {"devices": f"torch cannot be imported: {type(error).__name__}: {error}"}
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    rows = {
        "cuda": f"{torch.version.cuda or 'none'}, cuDNN {cudnn or 'none'}",
        "devices": "cpu",
    }
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        rows["devices"] = ", ".join(f"{card.name} ({amount(card.total_memory)})" for card in cards)
    rows["threads"] = f"{torch.get_num_threads()} of torch, {_thread_variables()}"
    return rows


def _thread_variables() -> str:
    """Return the environment variables that limit the number of threads, with their values."""
    given = [f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ]
    return ", ".join(given) or f"no {_THREADS[0]} or the like"


def file_system(path: Path) -> str:
    """Return the type of the file system that holds a path, such as "ext4" or "nfs4", or "unknown"."""
    kinds = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    place = path.resolve()
    above = (str(directory) for directory in (place, *place.parents))
    return next((kinds[directory] for directory in above if directory in kinds), "unknown")
