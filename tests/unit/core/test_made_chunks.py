"""Chunks that are made when asked for are the tuple that they would be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dcpconv.core.catalog import Chunk, Extent, MadeChunks, TensorEntry
from dcpconv.core.dtypes import BY_NAME

CHUNKS = tuple(Chunk((n,), (1,), Extent("a", 4 * n, 4)) for n in range(5))


def make() -> Iterator[Chunk]:
    return iter(CHUNKS)


def test_they_are_the_tuple() -> None:
    made = MadeChunks(make)
    assert (tuple(made), tuple(made), len(made)) == (CHUNKS, CHUNKS, 5)
    assert (made[0], made[-1], made[1:3]) == (CHUNKS[0], CHUNKS[-1], CHUNKS[1:3])
    assert made == CHUNKS
    assert hash(made) == hash(CHUNKS)
    with pytest.raises(IndexError):
        made[5]


def test_an_entry_of_them_equals_one_of_the_tuple() -> None:
    entry = TensorEntry("w", BY_NAME["float32"], (5,), MadeChunks(make))
    assert entry == replace(entry, chunks=CHUNKS)
    assert entry != replace(entry, chunks=CHUNKS[:4])
