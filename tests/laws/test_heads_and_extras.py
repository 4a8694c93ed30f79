"""Known models with other heads, without one, or with more than their table lists.

Nothing of them is renamed unless everything can be: under their own keys they go through every
form bit for bit, and another naming is refused with the list of what it has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import DcpconvError
from support.models.hf_models import save_hf, tiny
from support.models.layers import randomise

FORMS = ("hf", "dcp", "torch")


def there_and_back(source: Path, work: Path, form: str) -> Path:
    back = work / "back"
    if form == "hf":
        convert(source, back, form="hf")
        return back
    there = work / ("there.pth" if form == "torch" else "there")
    convert(source, there, form=form)  # type: ignore[arg-type]  # one of the forms
    convert(there, back, form="hf", assets=source if form == "torch" else None)
    return back


def classified(model_type: str, head: str) -> Callable[[Path], nn.Module]:
    def save(directory: Path) -> nn.Module:
        config = tiny(model_type).config
        config.num_labels = 3
        model = getattr(transformers, head)(config)
        randomise(model)
        model.eval().save_pretrained(directory)
        return model  # type: ignore[no-any-return]

    return save


def bare(model_type: str) -> Callable[[Path], nn.Module]:
    def save(directory: Path) -> nn.Module:
        whole = tiny(model_type)
        model = getattr(whole, whole.base_model_prefix)
        model.save_pretrained(directory)
        return model  # type: ignore[no-any-return]

    return save


def extended(
    model_type: str, add: Mapping[str, tuple[int, ...]], fields: Mapping[str, object]
) -> Callable[[Path], None]:
    """A model of a class whose files hold more: scales of a cache, layers that predict ahead."""

    def save(directory: Path) -> None:
        save_hf(tiny(model_type), directory)
        file = directory / "model.safetensors"
        more = {key: torch.rand(shape) for key, shape in add.items()}
        save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **fields}))

    return save


SCALES = {
    f"model.layers.{layer}.self_attn.{name}_scale": (1,) for layer in range(3) for name in "kv"
}
CACHE = {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}}
AHEAD = {
    "model.layers.3.eh_proj.weight": (96, 192),
    "model.layers.3.enorm.weight": (96,),
    "model.layers.3.shared_head.norm.weight": (96,),
}
MODELS: dict[str, Callable[[Path], nn.Module | None]] = {
    "llama-reward": classified("llama", "LlamaForSequenceClassification"),
    "qwen2-tokens": classified("qwen2", "Qwen2ForTokenClassification"),
    "qwen3-reward": classified("qwen3", "Qwen3ForSequenceClassification"),
    "llama-questions": classified("llama", "LlamaForQuestionAnswering"),
    "mistral-questions": classified("mistral", "MistralForQuestionAnswering"),
    "gpt2-tokens": classified("gpt2", "GPT2ForTokenClassification"),
    "falcon-questions": classified("falcon", "FalconForQuestionAnswering"),
    "llama-base": bare("llama"),
    "gpt2-base": bare("gpt2"),
    "qwen3-base": bare("qwen3"),
    "gemma2-base": bare("gemma2"),
    "llama-scales": extended("llama", SCALES, CACHE),
    "qwen3-ahead": extended("qwen3", AHEAD, {"num_nextn_predict_layers": 1}),
}


def stored(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_its_own_keys_go_through_every_form(tmp_path: Path, name: str, form: str) -> None:
    source = tmp_path / "in"
    MODELS[name](source)
    back = there_and_back(source, tmp_path, form)
    found, expected = stored(back), stored(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    config = json.loads((source / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == config


@pytest.mark.parametrize("name", MODELS)
def test_its_files_are_whole(tmp_path: Path, name: str) -> None:
    MODELS[name](tmp_path / "in")
    assert check(tmp_path / "in")


@pytest.mark.parametrize("name", MODELS)
def test_another_naming_is_refused_with_a_list(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in"
    MODELS[name](source)
    with pytest.raises(DcpconvError) as refused:
        convert(source, tmp_path / "out", to="lingua")
    told = [f"{label} {value}" for label, value in refused.value.facts]
    assert any(
        word in line
        for word in (
            "score.weight",
            "qa_outputs",
            "lm_head.weight",
            "_scale",
            "layers.3",
            "refused",
        )
        for line in told
    ), told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "scales" not in name and "ahead" not in name]
)
def test_it_loads_into_its_own_class(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in"
    model = MODELS[name](source)
    assert model is not None
    with torch.device("meta"):
        fresh = type(model)(model.config)
    load_init_weights(fresh, source)
    for key, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key
    assert check(source, against=model)


def test_what_the_config_does_not_explain_is_carried_and_told(tmp_path: Path) -> None:
    source = tmp_path / "in"
    extended("llama", {"model.layers.1.self_attn.sinks": (6,)}, {})(source)
    coverage = check(source)
    assert [fault.key for fault in coverage.unknown] == ["model.layers.1.self_attn.sinks"]
    report = convert(source, tmp_path / "out", form="hf")
    assert stored(tmp_path / "out").keys() == stored(source).keys()
    assert any("1 keys that hf-llama does not list are kept as stored" in n for n in report.notes)


@pytest.mark.parametrize("form", FORMS)
def test_second_names_of_an_unknown_model_are_as_the_stored_bytes_say(
    tmp_path: Path, form: str
) -> None:
    """Both names of a tied tensor are in a torch file and a DCP; files of hf hold every name that
    was stored, and names of one storage have the same bytes."""
    table = torch.rand(7, 4)
    apart = torch.rand(7, 4)
    state = {"tokens": table, "head": table, "copy": table.clone(), "apart": apart}
    torch.save(state, tmp_path / "model.pth")
    config = {"model_type": "novel", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    place = tmp_path / "model.pth"
    if form != "torch":
        convert(place, tmp_path / "there", form=form)  # type: ignore[arg-type]
        place = tmp_path / "there"
    convert(place, tmp_path / "out", form="hf", assets=tmp_path)
    found = stored(tmp_path / "out")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
