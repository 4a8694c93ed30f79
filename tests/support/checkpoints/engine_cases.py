"""Random parts over random source files, and the slow answer nobody doubts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.outline import Fill, Loop, OutFile, Outline, Part

KIB = 1 << 10

INTEGERS = {
    size: BY_NAME[name]
    for size, name in [(1, "uint8"), (2, "int16"), (4, "int32"), (8, "int64"), (16, "complex128")]
}


def merged(loops: list[Loop]) -> tuple[Loop, ...]:
    """The same nest with single iterations dropped and neighbours joined."""
    kept: list[Loop] = []
    for count, source, target in loops:
        if count > 1:
            if kept and kept[-1][1:] == (count * source, count * target):
                kept[-1] = (kept[-1][0] * count, source, target)
            else:
                kept.append((count, source, target))
    return tuple(kept)


def random_part(
    rng: random.Random, *, file: str, target: int, counts: list[tuple[int, int]], itemsize: int
) -> tuple[Part, int]:
    """A part over axes ``(count, target step)``, stored in any order with any padding.

    Returns the part and the bytes that its source file has to have.
    """
    steps = {}
    reach = 1
    order = list(range(len(counts)))
    if rng.random() < 0.7:
        rng.shuffle(order)
    for axis in reversed(order):
        steps[axis] = reach + (rng.choice([0, 0, 0, 1, 7, 3000]) if axis != order[-1] else 0)
        reach += (counts[axis][0] - 1) * steps[axis]
    offset = rng.choice([0, 8, 64, 4096, 12345])
    loops = merged([(count, steps[axis], step) for axis, (count, step) in enumerate(counts)])
    return Part(file, offset, target, loops), offset + reach * itemsize


def random_fill(
    rng: random.Random, *, dtype: DType, widest: int = 6
) -> tuple[Fill, dict[str, bytes]]:
    """A box of one to four axes, cut into parts along one of them, and its source files."""
    sizes = [rng.randint(1, 6) for _ in range(rng.randint(0, 3))] + [rng.randint(1, widest)]
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * sizes[dim + 1]
    cut = rng.randrange(len(sizes))
    edges = sorted({0, sizes[cut], *(rng.randint(0, sizes[cut]) for _ in range(rng.randint(0, 2)))})
    lengths: dict[str, int] = {}
    parts = []
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        counts = list(zip(sizes, strides, strict=True))
        counts[cut] = (end - begin, strides[cut])
        part, nbytes = random_part(
            rng,
            file=f"{index % 2}.bin",
            target=begin * strides[cut],
            counts=counts,
            itemsize=dtype.itemsize,
        )
        parts.append(part)
        lengths[part.file] = max(lengths.get(part.file, 0), nbytes)
    numel = 1
    for size in sizes:
        numel *= size
    files = {file: rng.randbytes(nbytes + rng.randint(0, 9)) for file, nbytes in lengths.items()}
    return Fill(dtype, dtype, numel, tuple(parts)), files


def random_outline(rng: random.Random) -> tuple[Outline, dict[str, bytes]]:
    """Files of literals, gaps, relabelled boxes and runs from one byte to a quarter MiB."""
    outputs: list[OutFile] = []
    stored = {"long.bin": rng.randbytes(400 * KIB)}
    for number in range(rng.randint(1, 3)):
        at = 0
        literals, payloads = [], []
        for index in range(rng.randint(0, 12)):
            at += rng.choice([0, 0, 3, 64, 5000, 70 * KIB])
            kind = rng.choice(["literal", "box", "short", "long", "congruent"])
            if kind == "literal":
                data = rng.randbytes(rng.choice([0, 1, 900, 40 * KIB]))
                literals.append((at, data))
                at += len(data)
                continue
            dtype = INTEGERS[rng.choice([1, 2, 4, 8])]
            box, files = random_fill(rng, dtype=dtype, widest=rng.choice([6, 2000]))
            if kind == "box":
                renamed = {file: f"{number}-{index}-{file}" for file in files}
                stored |= {renamed[file]: data for file, data in files.items()}
                parts = tuple(replace(part, file=renamed[part.file]) for part in box.parts)
                box = replace(box, parts=parts)
            else:
                nbytes = rng.randint(1, 3000) if kind == "short" else rng.randint(20, 250) * KIB + 5
                numel = nbytes // dtype.itemsize + 1
                offset = rng.randint(0, 100 * KIB)
                if kind == "congruent":
                    offset += (at - offset) % 4096
                box = replace(box, numel=numel, parts=(contiguous("long.bin", offset, numel),))
            payloads.append((at, box))
            at += box.nbytes
        nbytes = at + rng.choice([0, 1, 9000])
        outputs.append(OutFile(f"sub/{number}.out", nbytes, tuple(literals), tuple(payloads)))
    return Outline(tuple(outputs)), stored


def elements(part: Part, itemsize: int) -> dict[int, int]:
    """Target element -> source offset, one element at a time."""
    found = {}
    for indices in itertools.product(*(range(count) for count, _, _ in part.loops)):
        source, target = part.offset, part.target
        for index, (_, source_step, step) in zip(indices, part.loops, strict=True):
            source += index * source_step * itemsize
            target += index * step
        assert target not in found
        found[target] = source
    return found


def slow_fill(fill: Fill, files: Mapping[str, bytes]) -> bytes:
    """The box, element by element where it is not one run."""
    itemsize = fill.source_dtype.itemsize
    box = bytearray(fill.numel * itemsize)
    for part in fill.parts:
        if part.is_contiguous:
            stored = files[part.file][part.offset : part.offset + part.numel * itemsize]
            box[part.target * itemsize : part.target * itemsize + len(stored)] = stored
            continue
        for target, source in elements(part, itemsize).items():
            stored = files[part.file][source : source + itemsize]
            box[target * itemsize : (target + 1) * itemsize] = stored
    return bytes(box)


def slow_file(file: OutFile, files: Mapping[str, bytes]) -> bytes:
    """The file, piece by piece."""
    whole = bytearray(file.nbytes)
    for offset, data in file.literals:
        whole[offset : offset + len(data)] = data
    for offset, fill in file.payloads:
        whole[offset : offset + fill.nbytes] = slow_fill(fill, files)
    return bytes(whole)


def contiguous(file: str, offset: int, numel: int, *, target: int = 0) -> Part:
    """A part that is one run."""
    return Part(file, offset, target, ((numel, 1, 1),) if numel > 1 else ())


def store(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Write source files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory
