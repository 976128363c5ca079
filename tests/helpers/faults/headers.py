"""R11: headers of safetensors files, spoiled at random; the library's own reading is the judge."""

from __future__ import annotations

import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from lca_posthoc.checkpoints.headers import read_header
from lca_posthoc.checkpoints.trajectory import Checkpoint, read_checkpoint
from lca_posthoc.errors import LCAError

from . import fault

WHOLE = safetensors.torch.save(
    {
        "w": torch.arange(1.0, 7).reshape(2, 3),
        "b": torch.ones(2, dtype=torch.int64),
        "h": torch.ones(4).half(),
    },
    metadata={"step": "1"},
)
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER, BODY = json.loads(WHOLE[8 : 8 + LENGTH]), WHOLE[8 + LENGTH :]
NUMBERS = (-1, 0, 1, 2, 3, 6, 8, 16, 24, 48, 2**31, 2**32, 2**63, 2**64, 1.5, None, "8", [], {})
DTYPES = ("F32", "F64", "I64", "U8", "BOOL", "F16", "F33", "f32", 7, None)


def _flipped(chance: random.Random) -> bytes:
    data = bytearray(WHOLE)
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _cut(chance: random.Random) -> bytes:
    return WHOLE[: chance.randrange(len(WHOLE) + 1)] + chance.randbytes(chance.choice((0, 0, 1, 9)))


def _mutated(chance: random.Random) -> bytes:
    header: Any = json.loads(json.dumps(HEADER))
    for _ in range(chance.randint(1, 3)):
        entry = header[chance.choice([name for name in header if name != "__metadata__"])]
        field = chance.choice(("dtype", "shape", "data_offsets", "extra"))
        if field == "dtype":
            entry["dtype"] = chance.choice(DTYPES)
        elif field == "extra":
            header[chance.choice(("", "w", "../x", "\x00", "__metadata__"))] = chance.choice(
                (entry, {}, None, 3)
            )
            break
        elif isinstance(entry.get(field), list) and entry[field]:
            entry[field][chance.randrange(len(entry[field]))] = chance.choice(NUMBERS)
        else:
            entry[field] = chance.choice(NUMBERS)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + BODY


def _huge(chance: random.Random) -> bytes:
    """A million names, a header as long as it claims, a length nobody has."""
    kind = chance.randrange(3)
    if kind == 0:
        names = ",".join(
            f'"{at}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for at in range(400_000)
        )
        text = f"{{{names}}}".encode()
        return len(text).to_bytes(8, "little") + text
    if kind == 1:
        return (40 * 2**20).to_bytes(8, "little") + b"{" + b" " * (40 * 2**20 - 1)
    return chance.choice((2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + WHOLE[8:]


@fault("R11", "headers with flipped bits, cuts, wrong tables, millions of names", ci=600, full=5000)
def spoil_headers(count: int, place: Path) -> str:
    chance, file, process = random.Random(11), place / "step_0.safetensors", psutil.Process()
    accepted, growth, longest = 0, 0, 0.0
    for number in range(count):
        make = _huge if number % 250 == 249 else chance.choice((_flipped, _cut, _mutated))
        file.write_bytes(make(chance))
        gc.collect(0)
        before, began = process.memory_info().rss, time.process_time()
        tensors = _read(file)
        longest = max(longest, time.process_time() - began)
        growth = max(growth, process.memory_info().rss - before)
        if tensors is not None:
            accepted += 1
            theirs = safetensors.torch.load(file.read_bytes())
            assert theirs.keys() == tensors.keys(), number
            for name, tensor in tensors.items():
                assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), (
                    number
                )
                assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), number
    assert growth <= 64 * 2**20, growth
    assert longest < 1, longest
    return (
        f"{count} files: {accepted} accepted, each as safetensors reads it; at most "
        f"{growth / 2**20:.0f} MB and {longest:.2f} s of CPU"
    )


def _read(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors as a run reads them, or None where they are refused in one line that names the
    file.
    """
    try:
        header = read_header(file)
        checkpoint = Checkpoint(1, (file,), header.size, header.fingerprint)
        return read_checkpoint(checkpoint, {name: name for name in header.tensors})
    except LCAError as error:
        said = str(error)
    assert str(file) in said
    assert "\n" not in said
    return None
