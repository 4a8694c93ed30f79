"""A packed source is the source again, wherever it came from, and a fraction of its size."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcpconv import convert
from dcpconv.families.keymaps import keymaps
from dcpconv.plan.account import aim
from dcpconv.sources.packing import pack, rebased, unpack
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import understand
from support.models.hf_models import save_hf, tiny


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    hf = save_hf(tiny("llama"), directory / "hf", max_shard_size="200KB")
    convert(hf, directory / "dcp", form="dcp", to="lingua", chunks=3)
    convert(hf, directory / "torch.pth", form="torch", to="meta")
    odd = {"a": torch.ones(3), "b": torch.ones(5, 2).t(), "step": 3, "args": {"lr": 0.1}}
    torch.save(odd, directory / "odd.pth")
    blocks = {"w": torch.ones(4, 6).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)}
    save_file(blocks, directory / "blocks.safetensors")
    return directory


@pytest.mark.parametrize("name", ["hf", "dcp", "torch.pth", "odd.pth", "blocks.safetensors"])
def test_a_source_comes_back_as_it_was(sources: Path, name: str) -> None:
    said = Said.parse(dequantize=name.startswith("blocks"))
    source = understand(sources / name, said)
    found, _ = unpack(pack(source))
    assert found == source
    assert found.catalog.tensors is not source.catalog.tensors
    assert found.keymap is source.keymap  # which table it is, is told by identity
    for key, entry in source.catalog.tensors.items():
        assert found.catalog.tensors[key].dtype is entry.dtype


def test_what_is_made_of_it_is_the_same(sources: Path) -> None:
    source = understand(sources / "hf")
    wanted = aim(source, to="lingua").cover()
    found, _ = unpack(pack(source))
    assert found.keymap is keymaps()["hf-llama"]
    assert aim(found, to="lingua").cover() == wanted


def test_a_table_of_ones_own_stays_the_one_that_was_said(sources: Path, tmp_path: Path) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(
        'name = "mine"\ntitle = "Mine"\nsource = "here"\n\n[keys]\n"a" = ["embed", "V"]\n'
    )
    source, _ = unpack(pack(understand(sources / "odd.pth", Said.parse(keymap=table))))
    assert source.said.keymap is not None
    assert source.said.keymap.name == "mine"
    assert source.keymap is None or source.keymap is source.said.keymap


def test_many_tensors_take_few_bytes(tmp_path: Path) -> None:
    weights = {f"layers.{n}.experts.w.weight": torch.zeros(2, 1) for n in range(3000)}
    save_file(weights, tmp_path / "many.safetensors")
    source = understand(tmp_path / "many.safetensors")
    packed = pack(source)
    assert len(packed) < 40 * len(weights)
    assert len(packed) < len(pickle.dumps(source)) / 4


def test_another_path_has_the_same_files(sources: Path, tmp_path: Path) -> None:
    for name, file in (("hf", "hf"), ("torch.pth", "torch.pth")):
        source = understand(sources / name)
        there = tmp_path / "elsewhere" / file
        identities = dict.fromkeys(source.catalog.files, (1, 2, 3, 4))
        found = rebased(source, sources / name, there, identities)
        assert found.catalog.source == there
        assert found.catalog.path == (there if name == "hf" else there.parent)
        assert found.catalog.identities == found.weights.catalog.identities == identities
        assert found.weights.entries is source.weights.entries


def test_what_is_beside_it_keeps_its_ties_to_it(sources: Path) -> None:
    source = understand(sources / "hf")
    key, entry = next(iter(source.catalog.tensors.items()))
    other = replace(entry, key="exp_avg")
    found, beside = unpack(pack(source, {"model": source, key: other}, [other]))
    assert beside == {"model": source, key: other}
    assert beside["model"] is found
