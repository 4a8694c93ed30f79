"""Inputs that were whole once: bytes, JSON and text with faults put in, from a seed."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 7, 2.0, -0.0, 1e308, True, False, None),
    *(1 << 31, 1 << 32, (1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, -(10**30)),
]
TEXTS: list[Any] = [
    *(
        "",
        " ",
        "a",
        "\x00",
        "\x1b]0;title\x07",
        "\u202e",
        "\ud800",
        "a\nb",
        "{}",
        "{L}",
        "9" * 5000,
    ),
    *("../../etc/passwd", "/dev/zero", "F32", "BF16", "I64", "F4", "U8", "__metadata__", "weight"),
    *("model.layers.0.self_attn.q_proj.weight", "model.safetensors", "x" * 3000, "[/red]", "%s%n"),
]
SHAPES: list[Any] = [[], {}, [[]], [2, 2], [2.0, 2], ["2", "2"], [True, 4], [0, 0], [{}], {"a": {}}]
RAW = [
    *(b"1e999", b"NaN", b"-Infinity", b"Infinity", b"-0", b"1" * 5000, b"0x10", b"01", b"1e2"),
    *(b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b'"\\u0000"', b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"null", b"true", b"[]", b"{}", b'""', b",", b":", b"}", b"]", b" ", b"\x00", b"\x80"),
]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four faults anywhere, more of them near the two ends, where headers are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = max(1, len(out))
        near = rng.choice((size, min(size, 600), min(size, 100)))
        at = min(rng.randrange(near), size - 1)
        if rng.random() < 0.4:
            at = size - 1 - at
        length = rng.choice((1, 1, 2, 4, 8, 30))
        match rng.randrange(7):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del out[at : at + length]
            case 2:
                out[at:at] = rng.randbytes(length)
            case 3:
                out[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
            case 4:
                out[at:at] = out[at : at + length * 8]
            case 5:
                del out[at:]
            case _:
                out[at : at + length] = rng.choice(RAW)[: rng.choice((8, 10_000))]
    return bytes(out)


def mutated_json(value: Any, rng: random.Random) -> bytes:
    """The text of a JSON value in which something is what nobody expects."""
    tree = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        tree = _with_a_fault(tree, rng)
    data = json.dumps(tree).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        spots = [at for at, byte in enumerate(data) if byte in b"0123456789"] or [0]
        at = rng.choice(spots)
        data = data[:at] + rng.choice(RAW) + data[at + 1 :]
    if rng.random() < 0.1:
        data = data.decode("utf-8", "replace").encode(
            rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")), "surrogatepass"
        )
    return data


def _with_a_fault(tree: Any, rng: random.Random) -> Any:
    places = list(_places(tree, ()))
    path = rng.choice(places)
    if not path:
        return rng.choice((*NUMBERS, *TEXTS, *SHAPES, tree, tree, tree))
    parent = tree
    for part in path[:-1]:
        parent = parent[part]
    last = path[-1]
    match rng.randrange(5):
        case 0:
            parent[last] = rng.choice(NUMBERS)
        case 1:
            parent[last] = rng.choice(TEXTS)
        case 2:
            parent[last] = rng.choice(SHAPES)
        case 3:
            del parent[last]
        case _ if isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(last)
        case _:
            parent.append(parent[last])
    return tree


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    yield path
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _places(item, (*path, key))
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _places(item, (*path, index))


def mutated_text(text: str, rng: random.Random) -> bytes:
    """Text with lines changed, gone, doubled, or holding what a parser stumbles over."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                del lines[at]
                lines = lines or [""]
            case 1:
                lines.insert(at, lines[at])
            case 2:
                lines[at] = mutated_bytes(lines[at].encode(), rng).decode("latin-1")
            case 3:
                name = rng.choice(("name", "keys", "root", "always", "spec", "hints", "x"))
                nasty = ("1" * 5000, "[" * 3000, "1e999", "{a={a={}}}", '"\\ud800"', "nan", "-0")
                lines.insert(at, f"{name} = {rng.choice(nasty)}")
            case 4:
                lines[at] = lines[at].replace('"', rng.choice(("", "'", '"""')), 1)
            case _:
                words = ("{L}", "(h p)", "|", "d", "..", "[a | b]", "{X}", "()", "(", "9" * 50)
                lines[at] = lines[at].replace(" ", f" {rng.choice(words)} ", 1)
    return "\n".join(lines).encode("utf-8", "surrogatepass")
