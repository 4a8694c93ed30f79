"""ChatGLM and transformers' GLM: fused matrices, half-turned heads, and a buffer computed anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcpconv import convert
from dcpconv.core.catalog import Form
from dcpconv.core.errors import AmbiguousFamilyError, NotExpressibleError
from dcpconv.families.configs import read_spec, to_text, write_config
from support.checkpoints.families import RIGHT, assert_same, difference, load_hf, torch_tensors
from support.models.chatglm import ChatGLM, ChatGLMConfig
from support.models.hf_models import save_hf, tiny
from support.models.layers import randomise

CASES = [
    pytest.param(ChatGLMConfig(), id="groups"),
    pytest.param(ChatGLMConfig(num_layers=11), id="eleven-layers"),
    pytest.param(ChatGLMConfig(multi_query_attention=False), id="no-groups"),
    pytest.param(ChatGLMConfig(multi_query_group_num=6), id="as-many-groups-as-heads"),
    pytest.param(ChatGLMConfig(add_qkv_bias=False), id="no-bias"),
    pytest.param(ChatGLMConfig(rope_ratio=500.0, layernorm_epsilon=1.5625e-7), id="rope-ratio"),
    pytest.param(ChatGLMConfig(kv_channels=24), id="head-dim-apart"),
]


def save(model: ChatGLM, directory: Path) -> Path:
    directory.mkdir()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps(model.config.as_json()))
    return directory / "pytorch_model.bin"


@pytest.mark.parametrize("config", CASES)
def test_chatglm_becomes_glm_with_the_same_logits_and_comes_back(
    tmp_path: Path, config: ChatGLMConfig
) -> None:
    model = randomise(ChatGLM(config))
    source = save(model, tmp_path / "chatglm")
    family = "chatglm3" if config.multi_query_attention else "chatglm3-mha"
    report = convert(source, tmp_path / "hf", form="hf")
    assert (report.source.family, report.target.family) == (family, "hf-glm")
    assert difference(load_hf(tmp_path / "hf"), model) < RIGHT

    convert(tmp_path / "hf", tmp_path / "back.bin", to=family)
    assert_same(torch_tensors(tmp_path / "back.bin"), dict(model.state_dict()))


@pytest.mark.parametrize("heads", [2, 6])
def test_glm_becomes_chatglm_with_the_same_logits(tmp_path: Path, heads: int) -> None:
    glm = tiny("glm", num_key_value_heads=heads, rms_norm_eps=1.5625e-7)
    source = save_hf(glm, tmp_path / "glm")
    convert(source, tmp_path / "chatglm.bin", to="chatglm3")
    config = ChatGLMConfig(multi_query_group_num=heads, layernorm_epsilon=1.5625e-7)
    model = ChatGLM(config)
    model.load_state_dict(torch_tensors(tmp_path / "chatglm.bin"))
    assert difference(model.eval(), glm) < RIGHT


def test_the_buffer_has_the_type_of_the_weights(tmp_path: Path) -> None:
    source = save_hf(tiny("glm", dtype=torch.float16), tmp_path / "glm")
    convert(source, tmp_path / "chatglm.bin", to="chatglm3")
    found = torch_tensors(tmp_path / "chatglm.bin")["transformer.rotary_pos_emb.inv_freq"]
    assert torch.equal(found, (1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)).half())


@pytest.mark.parametrize("config", CASES)
def test_our_config_reads_back_to_the_same_spec(tmp_path: Path, config: ChatGLMConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.as_json()))
    spec = read_spec(tmp_path)
    (tmp_path / "config.json").write_text(to_text(write_config(spec.origin, spec)))
    assert read_spec(tmp_path) == spec


def tuned(directory: Path, *, projects: bool) -> tuple[ChatGLM, Path, dict[str, Tensor]]:
    """A model with the prefix that p-tuning trains, saved whole as ChatGLM's own script does."""
    model = randomise(ChatGLM(ChatGLMConfig()))
    source = save(model, directory)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (4, 192)}
    if projects:
        shapes |= {"trans.0.weight": (96, 192), "trans.0.bias": (96,)}
        shapes |= {"trans.2.weight": (192, 96), "trans.2.bias": (192,)}
    prefix = {
        f"transformer.prefix_encoder.{name}": torch.randn(shape) for name, shape in shapes.items()
    }
    torch.save({**model.state_dict(), **prefix}, source)
    stated = {"pre_seq_len": 4, **({"prefix_projection": True} if projects else {})}
    (directory / "config.json").write_text(json.dumps(model.config.as_json() | stated))
    return model, source, prefix


@pytest.mark.parametrize("form", ["hf", "dcp"])
@pytest.mark.parametrize("projects", [False, True])
def test_a_prefix_for_p_tuning_is_kept_in_a_file_of_its_own_and_finds_back(
    tmp_path: Path, form: Form, *, projects: bool
) -> None:
    model, source, prefix = tuned(tmp_path / "chatglm", projects=projects)
    report = convert(source, tmp_path / "glm", form=form, to="hf")
    assert set(prefix) < {key for key, _ in report.ignored}
    assert any("prefix_encoder.safetensors" in note for note in report.notes)
    assert_same(load_file(tmp_path / "glm" / "prefix_encoder.safetensors"), prefix)
    if form == "hf":
        assert difference(load_hf(tmp_path / "glm"), model) < RIGHT

    convert(tmp_path / "glm", tmp_path / "back.bin", to="chatglm3")
    assert_same(torch_tensors(tmp_path / "back.bin"), {**model.state_dict(), **prefix})
    convert(tmp_path / "glm", tmp_path / "back", form="hf", to="chatglm3")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields["pre_seq_len"] == 4
    assert fields.get("prefix_projection", False) == projects


def test_one_file_has_no_place_for_a_prefix_and_the_user_hears_how_to_keep_it(
    tmp_path: Path,
) -> None:
    _, source, prefix = tuned(tmp_path / "chatglm", projects=True)
    report = convert(source, tmp_path / "glm.pth", to="hf")
    (note,) = (note for note in report.notes if "--only" in note)
    only = note.partition("--only ")[2].split()[0]
    convert(source, tmp_path / "prefix.pth", only=only)
    found = torch_tensors(tmp_path / "prefix.pth")
    assert [torch.equal(found[key], prefix[key]) for key in sorted(prefix)] == [True] * 5


def test_a_prefix_stays_in_its_place_within_the_family(tmp_path: Path) -> None:
    model, source, prefix = tuned(tmp_path / "chatglm", projects=False)
    convert(source, tmp_path / "dcp", to="chatglm3")
    convert(tmp_path / "dcp", tmp_path / "back.bin", to="chatglm3")
    assert_same(torch_tensors(tmp_path / "back.bin"), {**model.state_dict(), **prefix})


def test_without_a_config_both_layouts_fit_and_the_user_is_asked(tmp_path: Path) -> None:
    model = randomise(ChatGLM(ChatGLMConfig(multi_query_attention=False)))
    torch.save(model.state_dict(), tmp_path / "chatglm.bin")
    with pytest.raises(AmbiguousFamilyError) as raised:
        convert(tmp_path / "chatglm.bin", tmp_path / "hf", form="hf", to="hf-glm")
    fits = [value for name, value in raised.value.facts if name == "fits"]
    assert fits == ["chatglm3", "chatglm3-mha"]


REFUSED = [
    pytest.param(ChatGLMConfig(), "lingua", {"partial_rotary", "qkv_bias"}, id="lingua"),
    pytest.param(ChatGLMConfig(), "hf-llama", {"partial_rotary", "qkv_bias"}, id="llama"),
    pytest.param(ChatGLMConfig(add_qkv_bias=False), "meta", {"partial_rotary"}, id="meta"),
]


@pytest.mark.parametrize(("config", "to", "names"), REFUSED)
def test_a_family_of_whole_turned_heads_refuses(
    tmp_path: Path, config: ChatGLMConfig, to: str, names: set[str]
) -> None:
    source = save(randomise(ChatGLM(config)), tmp_path / "chatglm")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names


def test_biases_everywhere_do_not_fit_glm(tmp_path: Path) -> None:
    fields = ChatGLMConfig().as_json() | {"add_bias_linear": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    spec = read_spec(tmp_path)
    assert {"qkv_bias", "o_bias", "mlp_bias"} <= spec.features().keys()
