"""How float32 products are rounded on every backend of torch, whatever the user's code has set.

torch keeps older and newer settings of the same thing, and refuses to read the older ones while the newer ones differ; so the newer
ones are used where torch has them, from 2.9 on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def _newer() -> tuple[list[Any], list[Any]]:
    """The settings of GPUs and of CPUs; none before torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends.mkldnn, "matmul"):
        return [], []
    mkldnn, cudnn = backends.mkldnn, backends.cudnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn], [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextlib.contextmanager
def _set(settings: list[Any], precision: str) -> Iterator[None]:
    held = [each.fp32_precision for each in settings]
    for each in settings:
        each.fp32_precision = precision
    try:
        yield
    finally:
        for each, before in zip(settings, held, strict=True):
            each.fp32_precision = before


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
    """Build and call models under this default dtype: constants made on the way must have the precision asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Matrix products and convolutions of float32 in float32; put back afterwards."""
    parts = [each for settings in _newer() for each in settings]
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
    """Let matrix products and convolutions of a GPU round their inputs to ten bits; inside `float32`."""
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
