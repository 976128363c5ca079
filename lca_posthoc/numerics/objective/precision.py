"""Settings of torch's backends that say how float32 products are rounded, whatever the user's code
has set.

torch has older and newer settings for this, and refuses to read the older ones while the newer ones
differ; so the newer ones are used where torch has them, from 2.9 on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..precisions import PRECISIONS


def dtype_of(precision: str) -> torch.dtype:
    """Return the type of the parameters and of the data in a precision."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision].dtype)
    return dtype


def _newer() -> tuple[list[Any], list[Any]]:
    """Return the settings of GPUs and those of CPUs; empty lists before torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends.mkldnn, "matmul"):
        return [], []
    mkldnn, cudnn = backends.mkldnn, backends.cudnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn], [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextlib.contextmanager
def _set(settings: list[Any], precision: str) -> Iterator[None]:
    earlier = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, before in zip(settings, earlier, strict=True):
            setting.fp32_precision = before


@contextlib.contextmanager
def _older(matmul: str, tf32: bool) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build and call models under this default dtype: constants made on the way must have the
    precision asked for.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Compute matrix products and convolutions of float32 in float32, and restore the settings
    afterwards.
    """
    parts = [setting for settings in _newer() for setting in settings]
    if not parts:
        with _older("highest", False):
            yield
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    try:
        with _set(parts, "ieee"):
            torch.set_float32_matmul_precision("highest")  # so that it can be read meanwhile
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let matrix products and convolutions of a GPU round their inputs to ten bits; inside
    `float32`.
    """
    on_gpus, _ = _newer()
    if not allowed:
        yield
        return
    if not on_gpus:
        with _older("high", True):
            yield
        return
    with _set(on_gpus, "tf32"):
        yield
