"""The last-resort law: whatever is in a file, the answer is a result or one of our errors.

Each form has a sound checkpoint, and mutated ones are made of it, 300 in an ordinary run and any
number with ``--fuzz N``.  The seed of an input is in the message of a failure.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import CliRunner

from dcpconv import check, fingerprint
from dcpconv.cli.app import app
from dcpconv.core.errors import DcpconvError
from dcpconv.families.keymaps.reading import read_keymap
from dcpconv.formats.opening import open_checkpoint
from dcpconv.formats.safetensors.files import read_catalog
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.hostile.mutation import mutated_bytes, mutated_json, mutated_text

TABLES = Path(__file__).parents[2] / "dcpconv/families/keymaps/tables"


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of file that is mutated.

    Attributes:
        write: Writes a sound checkpoint into a directory.
        file: The file of it that is mutated.
        mutate: Its bytes with faults.
        source: What is opened, relative to the directory.
        options: Of ``check``, ``inspect`` and ``keys``.
    """

    write: Callable[[Path], object]
    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    source: str = "."
    options: tuple[str, ...] = ()


def _hf(directory: Path, files: int = 1) -> None:
    write_hf(directory, llama_shapes(), files=files)


def _state() -> dict[str, object]:
    shapes = {"tok.weight": (5, 3), "layers.0.wq.weight": (3, 3), "norm.weight": (3,)}
    weights = {key: torch.ones(shape) for key, shape in shapes.items()}
    return {"model": weights, "step": 3, "args": {"lr": [0.1, 2], "name": "x"}}


def _torch(directory: Path) -> None:
    torch.save(_state(), directory / "model.pth")


def _dcp(directory: Path) -> None:
    save(_state(), checkpoint_id=directory)


def _keymap(directory: Path) -> None:
    _hf(directory)
    shutil.copy(TABLES / "lingua.toml", directory / "mine.toml")


def _key_list(directory: Path) -> None:
    tensors = {key: {"dtype": "fp32", "shape": [*n]} for key, n in llama_shapes().items()}
    value = {"dcpconv_keys": 1, "family": None, "tied": {}, "tensors": tensors}
    (directory / "keys.json").write_text(json.dumps(value))


def _header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file of which the header is mutated, as JSON or as bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.2:
        return mutated_bytes(data, rng)
    header = json.loads(data[8 : 8 + length])
    text = mutated_json(header, rng)
    text += b" " * rng.choice((0, 0, 8))
    claimed = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 1 << 40, (1 << 64) - 1))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def _json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutated_bytes(data, rng)
    return mutated_json(json.loads(data), rng)


FORMS = {
    "safetensors": Form(_hf, "model.safetensors", _header),
    "index": Form(lambda path: _hf(path, 2), "model.safetensors.index.json", _json),
    "torch-file": Form(_torch, "model.pth", mutated_bytes, "model.pth"),
    "metadata": Form(_dcp, ".metadata", mutated_bytes),
    "distcp": Form(_dcp, "__0_0.distcp", mutated_bytes),
    "config": Form(_hf, "config.json", _json),
    "key-list": Form(_key_list, "keys.json", _json, "keys.json"),
    "keymap": Form(
        _keymap,
        "mine.toml",
        lambda data, rng: mutated_text(data.decode(), rng),
        options=("--keymap", "{}/mine.toml"),
    ),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_other_error_leaves(form: Form, tmp_path: Path, fuzz: int) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    form.write(directory)
    whole = (directory / form.file).read_bytes()
    source = directory / form.source
    options = [option.format(directory) for option in form.options]
    for seed in range(fuzz):
        (directory / form.file).write_bytes(form.mutate(whole, random.Random(seed)))
        try:
            _try_all(source, options, seed)
        except Exception as error:
            error.add_note(f"seed {seed}") if hasattr(error, "add_note") else None
            raise


def _try_all(source: Path, options: list[str], seed: int) -> None:
    keymap = options[1] if options else None
    _expect_ours(lambda: open_checkpoint(source))
    _expect_ours(lambda: open_checkpoint(source, problems=[]))
    _expect_ours(lambda: check(source, keymap=keymap))
    _expect_ours(lambda: check(source, to="lingua", keymap=keymap))
    if keymap is not None:
        _expect_ours(lambda: read_keymap(Path(keymap)))
    target = source.parent / f"{source.name}-{seed}"
    attempts = [
        ["inspect", str(source), *options],
        ["keys", str(source), *options],
        ["convert", str(source), f"{target}.pth", *options],
        ["convert", str(source), str(target), "--form", "hf", *options],
        ["convert", str(source), str(target), "--to", "lingua", *options],
        ["convert", str(source), str(target), "--engine", "torch", *options],
        ["params", str(source), "--to", "lingua"],
        ["check", str(source), "--against", str(source)],
        ["families", "check", keymap or str(source)],
        ["families", "new", str(source)],
        ["fingerprint", str(source), "--json", *options],
        ["diff", str(source), str(source), *options],
        ["inspect", str(source), "-q", "--html", f"{target}.html", *options],
        ["check", str(source), "--html", f"{target}.html", *options],
    ]
    found = CliRunner().invoke(app, attempts[seed % len(attempts)])
    assert found.exit_code in {0, 1, 2}, found.output
    assert "this is a mistake in dcpconv" not in found.output, f"seed {seed}: {found.output}"
    assert "\x1b" not in found.output
    left = [path for path in target.parent.iterdir() if "staging" in path.name]
    assert not left, f"seed {seed}"


def test_no_other_error_leaves_a_manifest(tmp_path: Path, fuzz: int) -> None:
    _hf(tmp_path)
    manifest = tmp_path / "manifest.json"
    fingerprint(tmp_path).write(manifest)
    whole = manifest.read_bytes()
    outcomes = set()
    for seed in range(fuzz):
        manifest.write_bytes(_json(whole, random.Random(seed)))
        words = ["check", str(tmp_path), "--against", str(manifest), "--data"]
        found = CliRunner().invoke(app, words)
        outcomes.add(found.exit_code)
        assert found.exit_code in {0, 1, 2}, f"seed {seed}: {found.output}"
        assert "this is a mistake in dcpconv" not in found.output, f"seed {seed}: {found.output}"
        assert "\x1b" not in found.output
    assert 2 in outcomes


def _expect_ours(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except DcpconvError as error:
        assert all(map(str.isprintable, str(error).split("\n")))  # noqa: PT017 - no error is fine


def test_what_the_reference_reader_refuses_is_refused(tmp_path: Path, fuzz: int) -> None:
    """The oracle: safetensors itself.  It may refuse less than we do, never more."""
    file = tmp_path / "model.safetensors"
    offsets = {"a": [0, 24], "b": [24, 36], "c": [36, 36], "d": [36, 40]}
    shapes = {"a": [2, 3], "b": [3], "c": [0, 4], "d": []}
    header: dict[str, object] = {
        key: {"dtype": "F32", "shape": shapes[key], "data_offsets": at}
        for key, at in offsets.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt", "a": "b"}} | header).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(40)
    outcomes = {True: 0, False: 0}
    for seed in range(fuzz * 4):
        file.write_bytes(_header(whole, random.Random(seed)))
        try:
            with safe_open(file, framework="pt") as opened:
                keys = set(opened.keys())
            is_accepted = True
        except (SafetensorError, OSError, ValueError):
            is_accepted, keys = False, set()
        try:
            ours = set(read_catalog(file).tensors)
        except DcpconvError:
            continue
        finally:
            outcomes[is_accepted] += 1
        assert is_accepted, f"seed {seed}: {file.read_bytes()!r:.600}"
        assert ours == keys, f"seed {seed}"
    assert all(outcomes.values())
