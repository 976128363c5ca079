"""Chunks are read back from a pack as they were written, whether it is read whole or in parts, and
what a cut pack lacks is missing at its end.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lca_posthoc.results.packs import Pack, write_pack

LARGE, SMALL = 2**18, 100


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_chunks_come_back_and_a_cut_pack_gives_what_it_has(size: int, tmp_path: Path) -> None:
    chunks = {name: bytes([at]) * (size + at) for at, name in enumerate(("a", "b", "c"))}
    path = tmp_path / "pack"
    seals = write_pack(path, chunks, durable=False)
    pack = Pack(path, seals.values())
    assert {name: pack.read(seals[name]) for name in chunks} == chunks
    path.write_bytes(path.read_bytes()[:-3])
    cut = Pack(path, seals.values())
    assert cut.read(seals["a"]) == chunks["a"]
    assert cut.read(seals["c"]) == chunks["c"][:-3]


@pytest.mark.parametrize(("size", "survives"), [(SMALL, True), (LARGE, False)])
def test_only_a_small_pack_stays_in_memory(size: int, survives: bool, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    seals = write_pack(path, {"a": bytes(size), "b": b"other"}, durable=False)
    pack = Pack(path, seals.values())
    pack.read(seals["a"])
    path.unlink()
    if survives:
        assert pack.read(seals["b"]) == b"other"
    else:
        with pytest.raises(FileNotFoundError):
            pack.read(seals["b"])
