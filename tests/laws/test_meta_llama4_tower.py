"""Llama 4 with its tower: what Meta's own code sees in an image, under the names of two sides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Llama4ForConditionalGeneration

from dcpconv import check, convert, fingerprint, load_init_weights
from dcpconv.core.errors import CoverageError, FormatError, NotExpressibleError
from laws.test_meta_llama4 import DENSE, NAMINGS
from support.checkpoints.families import (
    RIGHT,
    assert_same,
    difference,
    hf_tensors,
    torch_tensors,
)
from support.models.hf_models import save_hf
from support.models.meta_package import IMAGE, MetaLlama4, loaded, one_rank
from support.models.nested_models import NESTED, nested
from support.worlds import meta_ranks
from support.worlds.ranks import run_ranks

pytest.importorskip("fairscale", reason="needs .[interop]")
pytest.importorskip("llama_models", reason="needs .[interop]")

CASES = [
    pytest.param({}, id="usual"),
    pytest.param({"num_hidden_layers": 11}, id="eleven-layers"),
    pytest.param({"image_size": 24, "num_attention_heads": 1}, id="larger-images"),
    pytest.param({"pixel_shuffle_ratio": 1.0, "intermediate_size": 24}, id="unshuffled"),
    pytest.param(
        {
            "hidden_size": 40,
            "intermediate_size": 160,
            "vision_output_dim": 28,
            "projector_input_dim": 28,
            "projector_output_dim": 28,
        },
        id="widths",
    ),
]


@pytest.fixture
def _on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with one_rank(tmp_path, monkeypatch):
        yield


GUARD: dict[str, Any] = {
    **DENSE,
    "no_rope_layers": [1, 1, 1, 1],
    "layer_types": ["full_attention"] * 4,
}
"""The language model of Llama Guard 4: no experts, every layer turns and sees everything."""


def model(language: Mapping[str, Any] | None = None, **vision: Any) -> Any:
    """A tiny Llama 4 whose vocabulary has a token for images."""
    class_name, text, towers = NESTED["llama4"]
    seen = {**towers["vision_config"], **vision}  # type: ignore[dict-item]
    text = {**text, "vocab_size": 132, **(language or {})}
    made = nested(class_name, "llama4", text, vision_config=seen, image_token_index=IMAGE)
    rotary = made.vision_model.rotary_embedding
    # Complex numbers, of which a cast to fp32 has left the real part.
    rotary.freqs_ci = rotary._compute_freqs_ci(made.config.vision_config)
    return made


def seen(config: Any) -> tuple[Tensor, Tensor]:
    """Token ids of two texts, and the images in them."""
    vision = config.vision_config
    side, ratio = vision.image_size // vision.patch_size, vision.pixel_shuffle_ratio
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, IMAGE, (2, 50), generator=generator)
    tokens[:, 3 : 3 + round((side * ratio) ** 2)] = IMAGE
    shape = (2, 3, vision.image_size, vision.image_size)
    return tokens, torch.randn(shape, generator=generator)


def answers(one: Any, config: Any) -> Tensor:
    tokens, pixels = seen(config)
    with torch.no_grad():
        found = one(tokens, pixel_values=pixels)
    return torch.as_tensor(getattr(found, "logits", found))


def apart(left: Any, right: Any, config: Any) -> float:
    return float((answers(left, config) - answers(right, config)).abs().max())


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("to", NAMINGS)
@pytest.mark.parametrize("vision", CASES)
def test_both_see_the_same_and_the_way_back_is_exact(
    tmp_path: Path, vision: dict[str, Any], to: str
) -> None:
    hf = model(**vision)
    source = save_hf(hf, tmp_path / "hf")
    assert check(source, to=to)
    convert(source, tmp_path / "dcp", form="dcp", to=to)
    convert(tmp_path / "dcp", tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "dcp/params.json").read_text())
    meta = loaded(params, torch_tensors(tmp_path / "consolidated.00.pth"))
    assert apart(meta, hf, hf.config) < RIGHT
    assert difference(meta, hf) < RIGHT

    # The parameters of the language model and of its tower are all that the way back needs.
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", to="hf")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    back = Llama4ForConditionalGeneration.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    ).eval()
    back.config.image_token_index = IMAGE
    assert apart(back, hf, hf.config) < RIGHT
    for name in NESTED["llama4"][2]["vision_config"]:  # type: ignore[attr-defined]
        assert getattr(back.config.vision_config, name) == getattr(hf.config.vision_config, name)


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("to", NAMINGS)
def test_llama_guard_4_has_no_experts(tmp_path: Path, to: str) -> None:
    hf = model(GUARD)
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "release", form="torch", to=to, model_parallel=2)
    convert(tmp_path / "release", tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "release/params.json").read_text())
    meta = loaded(params, torch_tensors(tmp_path / "consolidated.00.pth"))
    assert apart(meta, hf, hf.config) < RIGHT

    convert(tmp_path / "release", tmp_path / "back", form="hf", to="hf")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    text = json.loads((tmp_path / "back/config.json").read_text())["text_config"]
    assert {name: text[name] for name in DENSE} == DENSE


@pytest.mark.usefixtures("_on_a_cpu")
def test_live_models_take_files_of_either_side(tmp_path: Path) -> None:
    hf = model()
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="meta-llama4")
    params = json.loads((tmp_path / "dcp/params.json").read_text())
    live = MetaLlama4(params)
    load_init_weights(live.model, source, to="meta-memory-llama4")
    assert apart(live.eval(), hf, hf.config) < RIGHT

    with torch.device("meta"):
        fresh = type(hf)(hf.config)
    load_init_weights(fresh, tmp_path / "dcp", to="hf-memory")
    assert_same(dict(fresh.state_dict()), dict(hf.state_dict()))


@pytest.mark.usefixtures("_on_a_cpu")
def test_a_live_model_without_the_tower_leaves_it_out(tmp_path: Path) -> None:
    hf = model()
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="meta-llama4")
    params = json.loads((tmp_path / "dcp/params.json").read_text())
    del params["vision_args"]
    live = MetaLlama4(params)
    report = load_init_weights(live.model, source, to="meta-memory-llama4")
    assert difference(live.eval(), hf) < RIGHT
    assert len(report.ignored) == sum("vision" in key or "multi" in key for key in hf.state_dict())

    text = hf.language_model
    with torch.device("meta"):
        fresh = type(text)(text.config)
    load_init_weights(fresh, tmp_path / "dcp", to="hf-llama4_text")
    assert_same(dict(fresh.state_dict()), dict(text.state_dict()))


def test_the_language_model_alone_leaves_the_tower_beside_it(tmp_path: Path) -> None:
    hf = model()
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="meta-llama4")
    convert(tmp_path / "dcp", tmp_path / "text", form="dcp", to="hf-llama4_text")
    assert (tmp_path / "text/aside.safetensors").is_file()
    convert(tmp_path / "text", tmp_path / "text.pth", form="torch")
    text = torch_tensors(tmp_path / "text.pth")
    assert_same(text, dict(hf.language_model.state_dict()))


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("to", NAMINGS)
def test_a_language_model_without_its_tower_is_asked_for_none(tmp_path: Path, to: str) -> None:
    hf = model()
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to=to, only="language_model")
    convert(tmp_path / "dcp", tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "dcp/params.json").read_text())
    assert "vision_args" not in params
    meta = loaded(params, torch_tensors(tmp_path / "consolidated.00.pth"))
    assert difference(meta, hf) < RIGHT


def test_half_a_tower_is_missing_the_rest(tmp_path: Path) -> None:
    source = save_hf(model(), tmp_path / "hf")
    tensors = hf_tensors(source)
    gone = "vision_model.vision_adapter.mlp.fc1.weight"
    save_file({k: t for k, t in tensors.items() if k != gone}, source / "model.safetensors")
    with pytest.raises(CoverageError) as raised:
        convert(source, tmp_path / "out", form="dcp", to="meta-llama4")
    missing = [str(what) for label, what in raised.value.facts if label == "missing"]
    assert missing == [f"vision_embeddings.vision_adapter.mlp.c_fc.weight  needs {gone}"]


def test_the_naming_does_not_matter_to_the_fingerprint(tmp_path: Path) -> None:
    source = save_hf(model(), tmp_path / "hf")
    for to in NAMINGS:
        convert(source, tmp_path / to, form="dcp", to=to)
        assert fingerprint(tmp_path / to).digest == fingerprint(source).digest


def test_two_ranks_of_metas_own_code_see_the_same(tmp_path: Path) -> None:
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    hf = model()
    source = save_hf(hf, tmp_path / "hf")
    convert(source, tmp_path / "whole.pth", form="torch", to="meta-llama4")
    convert(source, tmp_path / "release", form="torch", to="meta-llama4", model_parallel=2)
    whole = convert_moe_weights(torch_tensors(tmp_path / "whole.pth"), 5)
    for rank in range(2):
        right = reshard_mp([whole], size=2, rank=rank)
        found = torch_tensors(tmp_path / f"release/consolidated.0{rank}.pth")
        towers = {key for key in right if key.startswith("vision")}
        assert len(towers) > 40
        assert_same({key: found[key] for key in towers}, {key: right[key] for key in towers})

    torch.save(seen(hf.config), tmp_path / "seen.pt")
    run_ranks(meta_ranks.__file__, 2, tmp_path, timeout_s=120)
    logits = torch.load(tmp_path / "logits.pt")
    assert (logits - answers(hf, hf.config)).abs().max() < RIGHT

    convert(tmp_path / "release", tmp_path / "back", form="hf", to="hf")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_heads_of_the_tower_are_not_cut(tmp_path: Path) -> None:
    source = save_hf(model(num_attention_heads=3), tmp_path / "hf")
    with pytest.raises(FormatError, match="2 equal parts") as raised:
        convert(source, tmp_path / "out", form="torch", to="meta-llama4", model_parallel=2)
    assert dict(raised.value.facts) == {
        "vision_config.num_attention_heads": "3 heads, of which each is in one file whole"
    }


@pytest.mark.parametrize(
    ("vision", "name"),
    [
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
            "rope_parameters.rope_theta",
            id="theta",
        ),
        pytest.param({"num_channels": 1}, "num_channels", id="grey"),
        pytest.param({"projector_output_dim": 24}, "projector_output_dim", id="projector"),
        pytest.param({"intermediate_size": 64}, "intermediate_size", id="widths"),
    ],
)
def test_what_metas_code_cannot_compute_is_refused_by_name(
    tmp_path: Path, vision: dict[str, Any], name: str
) -> None:
    source = save_hf(model(**vision), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", form="dcp", to="meta-llama4")
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused == {f"config.vision_config.{name}"}


@pytest.mark.parametrize(
    ("vision", "name"),
    [
        pytest.param({"image_size": {"height": 16, "width": 20}}, "image_size", id="oblong-images"),
        pytest.param({"patch_size": {"height": 4, "width": 2}}, "patch_size", id="oblong-patches"),
        pytest.param({"mlp_ratio": 3.0}, "mlp_ratio", id="widths"),
        pytest.param({"is_gated": True}, "is_gated", id="strange"),
    ],
)
def test_what_hugging_faces_class_cannot_compute_is_refused_by_name(
    tmp_path: Path, vision: dict[str, Any], name: str
) -> None:
    source = save_hf(model(), tmp_path / "hf")
    convert(source, tmp_path / "dcp", form="dcp", to="meta-llama4")
    file = tmp_path / "dcp/params.json"
    params = json.loads(file.read_text())
    params["vision_args"] |= vision
    file.write_text(json.dumps(params))
    with pytest.raises(NotExpressibleError) as raised:
        convert(tmp_path / "dcp", tmp_path / "out", form="hf", to="hf")
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused == {f"config.vision_args.{name}"}
