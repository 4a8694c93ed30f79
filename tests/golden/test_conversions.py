"""The bytes that conversions write, file by file: a change in them is a decision, not an accident.

``conversions.json`` holds a digest of every result.  ``python tests/golden/test_conversions.py``
writes it anew; the CHANGELOG then needs a line under "Bytes written".
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import convert
from support.models.hf_models import save_hf, tiny

GOLDEN = Path(__file__).with_name("conversions.json")

CONVERSIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-dcp": ("llama", "llama.dcp", {"form": "dcp"}),
    "llama-torch": ("llama", "llama.pth", {"form": "torch"}),
    "llama-hf-3-files": ("llama", "llama.3", {"form": "hf", "max_file_size": 400_000}),
    "llama-lingua": ("llama", "lingua", {"to": "lingua"}),
    "llama-lingua-chunks": ("llama", "lingua.4", {"to": "lingua", "chunks": 4}),
    "llama-lingua-bf16": ("llama", "lingua.bf16", {"to": "lingua", "dtype": "bf16"}),
    "llama-meta": ("llama", "meta", {"to": "meta"}),
    "llama-meta-2": ("llama", "meta.2", {"to": "meta", "model_parallel": 2}),
    "llama-minimind": ("tied", "minimind.pth", {"to": "minimind3", "form": "torch"}),
    "llama-torchtitan": ("llama", "titan", {"to": "torchtitan-llama3", "form": "dcp"}),
    "dcp-torch": ("llama.dcp", "back.pth", {"form": "torch"}),
    "dcp-hf": ("lingua.4", "back", {"to": "hf"}),
    "torch-dcp": ("llama.pth", "again.dcp", {"form": "dcp"}),
    "torch-hf": ("llama.pth", "again", {"form": "hf", "assets": "llama"}),
    "meta-hf": ("meta", "meta.hf", {"to": "hf"}),
    "only": ("llama", "part", {"form": "dcp", "only": "model.layers.1"}),
    "qwen3-moe-memory": ("qwen3_moe", "moe.dcp", {"to": "hf-memory-qwen3_moe", "form": "dcp"}),
    "qwen3-moe-torchtitan": ("qwen3_moe", "moe.titan", {"to": "torchtitan-qwen3", "form": "dcp"}),
    "glm-chatglm": ("glm", "chatglm", {"to": "chatglm3"}),
    "tied-lingua": ("tied", "tied.lingua", {"to": "lingua"}),
}
"""Name -> source, target, options; a source may be the target of an earlier row."""


def _sources() -> None:
    save_hf(tiny("llama"), Path("llama"))
    save_hf(tiny("llama", tie_word_embeddings=True), Path("tied"))
    save_hf(tiny("qwen3_moe", dtype=torch.bfloat16), Path("qwen3_moe"))
    save_hf(tiny("glm", attention_bias=True), Path("glm"))
    for config in Path().glob("*/config.json"):
        fields = json.loads(config.read_text())
        fields.pop("transformers_version")
        config.write_text(json.dumps(fields))


def _digest(result: Path) -> str:
    """Of every file's name and bytes."""
    files = [result] if result.is_file() else [f for f in sorted(result.rglob("*")) if f.is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


def _digests(place: Path) -> dict[str, str]:
    here = Path.cwd()
    os.chdir(place)  # Lingua's params.json names its tokenizer as the target was typed
    try:
        _sources()
        found = {}
        for name, (source, target, options) in CONVERSIONS.items():
            convert(source, target, **options)
            found[name] = _digest(Path(target))
    finally:
        os.chdir(here)
    return found


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _digests(tmp_path_factory.mktemp("conversions"))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_bytes_are_the_recorded_ones(name: str, digests: dict[str, str]) -> None:
    assert digests[name] == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        GOLDEN.write_text(json.dumps(_digests(Path(place)), indent=2) + "\n")
    sys.stdout.write(f"{len(CONVERSIONS)} digests written\n")
