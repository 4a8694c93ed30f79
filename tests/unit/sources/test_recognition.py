"""Which family a checkpoint is of, and why: keys, shapes and config speak, and none is ignored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import AmbiguousFamilyError
from dcpconv.families.configs import read_spec
from dcpconv.families.keymaps import keymaps
from dcpconv.sources.fitting import bare
from dcpconv.sources.recognition import recognise
from support.checkpoints.virtual import checkpoint
from support.checkpoints.virtual_kinds import spec_of
from support.models.chatglm import ChatGLM, ChatGLMConfig
from support.models.hf_models import MODEL_TYPES, save_hf, tiny
from support.models.minimind import MiniMind, MiniMindConfig


def catalog(state: dict[str, torch.Tensor], prefix: str = "") -> Catalog:
    """A checkpoint of these keys and shapes, without bytes."""
    entries = {
        prefix + key: TensorEntry(prefix + key, BY_NAME["float32"], tuple(tensor.shape), ())
        for key, tensor in state.items()
    }
    return Catalog("torch", Path(), Path("model.pth"), {}, entries)


def minimind(**sizes: Any) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return MiniMind(MiniMindConfig(**sizes)).state_dict()


MINIMINDS = [
    pytest.param(
        {"generation": "gen1", "dim": 512, "n_heads": 16, "n_kv_heads": 8, "head_dim": 32},
        "minimind1",
        "6400 tokens and 2 query heads per kv head",
        id="gen1",
    ),
    pytest.param(
        {"generation": "gen2", "dim": 512, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
        "minimind2",
        "6400 tokens and 4 query heads per kv head",
        id="gen2",
    ),
    pytest.param({"generation": "gen3"}, "minimind3", "6400 tokens", id="gen3"),
    pytest.param({"generation": "gen4"}, "minimind4", "6400 tokens", id="gen4"),
    pytest.param({"generation": "gen1", "mask": True}, "minimind1", "", id="gen1-masks"),
    pytest.param({"generation": "gen3", "experts": 5}, "minimind3", "", id="gen3-experts"),
    pytest.param(
        {"generation": "gen4", "experts": 5}, "minimind4", "6400 tokens", id="gen4-experts"
    ),
]


@pytest.mark.parametrize(("sizes", "family", "clue"), MINIMINDS)
def test_generations_of_minimind_are_told_by_keys_and_shapes(
    sizes: dict[str, Any], family: str, clue: str
) -> None:
    found = recognise(catalog(minimind(vocab_size=6400, **sizes)))
    assert found.keymap is keymaps()[family]
    assert not found.alternatives
    assert any(said.startswith(clue) for said in found.evidence), found.evidence


@pytest.mark.parametrize("generation", ["gen1", "gen2"])
def test_names_that_lead_to_the_same_bytes_are_listed_and_nobody_is_asked(generation: Any) -> None:
    found = recognise(catalog(minimind(generation=generation)))
    assert not found.alternatives
    assert found.evidence == (
        "30 of 30 keys match lingua",
        "the same bytes as meta, torchtitan-llama3-2025, minimind1, minimind2",
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_names_the_class_and_keys_say_disk_or_memory(
    tmp_path: Path, model_type: str
) -> None:
    model = tiny(model_type)
    spec = read_spec(save_hf(model, tmp_path))
    live = recognise(catalog(model.state_dict()), spec=spec)
    named = "llama" if model_type == "mistral" else model_type
    stacked = f"hf-memory-{model_type}"
    assert live.require_keymap().name == (stacked if stacked in keymaps() else f"hf-{named}")
    assert f"the parameter file beside it is of hf-{named}" in live.evidence


def test_without_a_config_classes_that_differ_only_in_code_are_one() -> None:
    found = recognise(catalog(tiny("qwen2").state_dict()))
    assert found.require_keymap().name == "hf-llama"
    assert "the same bytes as hf-qwen2" in found.evidence


@pytest.mark.parametrize("grouped", [True, False])
def test_a_config_decides_between_layouts_of_equal_shapes(tmp_path: Path, *, grouped: bool) -> None:
    config = ChatGLMConfig(multi_query_attention=grouped, multi_query_group_num=6)
    with torch.device("meta"):
        entries = catalog(ChatGLM(config).state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config.as_json()))
    found = recognise(entries, spec=read_spec(tmp_path))
    assert found.require_keymap().name == ("chatglm3" if grouped else "chatglm3-mha")

    with pytest.raises(AmbiguousFamilyError) as raised:
        recognise(entries).require_keymap()
    assert raised.value.hint == "choose one with --from NAME"
    fits = [value for name, value in raised.value.facts if name == "fits"]
    assert fits == ["chatglm3", "chatglm3-mha"]


def test_the_user_has_the_last_word() -> None:
    entries = catalog(minimind(generation="gen1"))
    assert recognise(entries, keymap=keymaps()["minimind1"]).keymap is keymaps()["minimind1"]


def test_a_class_that_the_config_names_is_kept_even_if_a_key_is_strange(tmp_path: Path) -> None:
    model = tiny("olmo2")
    spec = read_spec(save_hf(model, tmp_path))
    state = model.state_dict() | {"model.layers.0.novel.weight": torch.ones(2)}
    assert recognise(catalog(state), spec=spec).require_keymap().name == "hf-olmo2"


@pytest.mark.parametrize(
    ("root", "family"),
    [("model.", "hf-llama"), ("module.", "lingua"), ("module._orig_mod.", "hf-qwen3")],
)
def test_wrappers_are_seen_through(root: str, family: str) -> None:
    kind = "qk-norm" if family == "hf-qwen3" else "plain"
    start = checkpoint(keymaps()[family], spec_of(kind)).catalog
    wrapped = {root + key: entry for key, entry in start.tensors.items()}
    found = recognise(
        replace(start, tensors={**wrapped, "optim.step": start.tensors[next(iter(start.tensors))]})
    )
    assert found.require_keymap().name == family
    assert found.entries.keys() == start.tensors.keys()
    assert found.rest == ("optim.step",)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("layers.0._orig_mod.wq.weight", "layers.0.wq.weight"),
        ("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.wq", "layers.0.wq"),
        ("layers.0.wq", "layers.0.wq"),
    ],
)
def test_bare_keys(key: str, expected: str) -> None:
    assert bare(key) == expected


def test_keys_that_nobody_knows_are_said_to_be_so() -> None:
    found = recognise(catalog({"a.b": torch.ones(2), "c.d": torch.ones(3)}))
    assert found.keymap is None
    assert found.evidence == ("no table knows these keys",)
    with pytest.raises(AmbiguousFamilyError, match="no naming table"):
        found.require_keymap()
