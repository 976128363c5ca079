"""Set how torch's backends round float32 products, overriding the user's settings.

torch has older and newer settings for this, and raises an error when the older ones are read while
the newer ones differ. This module therefore uses the newer ones if torch has them (since 2.9).
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
    """Return the settings of GPUs and of CPUs; empty lists before torch 2.9."""
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
    """Build and call models under a default dtype, because constants they create must have the
    requested precision.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Compute float32 matrix products and convolutions in float32; restore the settings afterwards."""
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
            torch.set_float32_matmul_precision("highest")  # keeps the older setting readable
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU round inputs of matrix products and convolutions to ten bits; use inside `float32`."""
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
