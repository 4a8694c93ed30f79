"""torchtitan's own Kimi and Muse Glimmer: language models beside a tower that looks at images.

The logits of text are those of the Hugging Face model, and every tensor, those of the tower too,
has the bytes that the package's own adapter gives it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from laws.test_torchtitan_deepseek import titan_config
from support.checkpoints.families import RIGHT, TOKENS, assert_same, hf_tensors, torch_tensors
from support.models.hf_models import save_hf
from support.models.layers import randomise
from support.models.nested_models import TEXT, nested, small
from support.models.titan_package import Attend, built, on_a_cpu

pytest.importorskip("torchtitan", reason="needs .[interop]")

KIMI, MUSE = "torchtitan-kimi_k2_7", "torchtitan-muse_glimmer"
VISION = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_attention_heads": 3,
    "patch_size": 4,
    "pos_emb_height": 5,
    "pos_emb_width": 5,
}
YARN = {
    "rope_theta": 1e4,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
KIMI_CASES = [
    pytest.param({}, id="usual"),
    pytest.param({"num_hidden_layers": 11, "n_group": 1, "topk_group": 1}, id="eleven-layers"),
    pytest.param({"q_lora_rank": None, "n_shared_experts": 2}, id="direct-queries"),
    pytest.param({"rope_parameters": YARN, "n_routed_experts": 12}, id="yarn-twelve-experts"),
]
MUSE_CASES = [
    pytest.param({}, id="usual"),
    pytest.param({"num_hidden_layers": 11}, id="eleven-layers"),
    pytest.param({"head_dim": 24, "num_attention_heads": 4, "qk_scale_factor": 2.5}, id="heads"),
    pytest.param(
        {
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
            "layer_rope_theta": [0, 5e5, 5e5, 0],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "output_multiplier": 0.5,
        },
        id="other-layers",
    ),
]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch)
    # Muse Glimmer asks how its activations are sharded also where there is one device.
    monkeypatch.setattr("spmd_types.assert_type", lambda tensor, *_: tensor)


def titan_kimi_config(hf: Any) -> Any:
    """What torchtitan's config says of the same model."""
    from torchtitan.models.kimi_k2_7 import KimiK25Model, _vision_encoder_config

    text = titan_config(type("Nested", (), {"config": hf.config.text_config}))
    vision = hf.config.vision_config
    same = ("vocab_size", "dim", "layers", "mtp_layers", "tok_embeddings", "norm", "lm_head")
    return KimiK25Model.Config(
        **{name: getattr(text, name) for name in same},
        vision_encoder=_vision_encoder_config(
            dim=vision.hidden_size,
            ffn_dim=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            patch_size=vision.patch_size,
            init_pos_emb_height=vision.pos_emb_height,
            init_pos_emb_width=vision.pos_emb_width,
            text_hidden_size=hf.config.text_config.hidden_size,
        ),
    )


def muse(**overrides: Any) -> Any:
    """A tiny Muse Glimmer."""
    vision = {**VISION, "num_hidden_layers": 5, **overrides.pop("vision", {})}
    return nested(
        "MuseGlimmerForConditionalGeneration",
        "muse_glimmer",
        {**TEXT, "sliding_window": 8, "post_norm_eps": 1e-7, **overrides},
        vision_config=vision,
        out_hidden_size=192,
        projector_hidden_size=40,
        tie_word_embeddings=bool(overrides.get("tie_word_embeddings", False)),
    )


def titan_muse_config(hf: Any) -> Any:
    """What torchtitan's config says of the same model."""
    from torchtitan.models.muse_glimmer import (
        _muse_glimmer_config,
        muse_glimmer_vision_adapter_config,
        muse_glimmer_vision_encoder_config,
    )

    text, vision = hf.config.text_config, hf.config.vision_config
    encoder = muse_glimmer_vision_encoder_config(
        latent_dim=vision.hidden_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
        patch_size=vision.patch_size,
        patch_temporal=vision.patch_temporal,
        downsample_factor=vision.merge_size,
        pos_emb_grid_h=vision.pos_emb_height,
        pos_emb_grid_w=vision.pos_emb_width,
    )
    width = hf.config.projector_hidden_size
    config = _muse_glimmer_config(
        dim=text.hidden_size,
        n_layers=text.num_hidden_layers,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocab_size,
        max_seq_len=64,
        window_pattern=[0],
        output_multiplier=text.output_multiplier,
        attn_backend="flex",
        vision_adapter_dim=width,
        vision_encoder=encoder,
        vision_adapter=muse_glimmer_vision_adapter_config(
            input_dim=encoder.output_dim, output_dim=width
        ),
    )
    for layer, theta in zip(config.layers, text.layer_rope_theta, strict=True):
        layer.attention.use_rope = bool(theta)
        layer.attention.rope.theta = text.rope_parameters["rope_theta"]
        layer.attention.scale_query_by = text.qk_scale_factor
        layer.feed_forward.w1.out_features = text.intermediate_size
        layer.feed_forward.w3.out_features = text.intermediate_size
        layer.feed_forward.w2.in_features = text.intermediate_size
    return config


def published(directory: Path, hf: Any, tensors: dict[str, Tensor]) -> Path:
    """Files of Kimi under the names that it is published with, which transformers reads but does
    not write."""
    directory.mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf.config.save_pretrained(directory)
    return directory


def difference(titan: Any, hf: Any) -> float:
    """Largest |logit difference| of text."""
    with torch.no_grad():
        found = titan(TOKENS, positions=torch.arange(TOKENS.shape[1])[None])
        return float((found - hf(TOKENS, use_cache=False).logits).abs().max())


@pytest.mark.parametrize("overrides", KIMI_CASES)
def test_kimi_gives_the_logits_and_its_adapter_the_bytes(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    from torchtitan.models.kimi_k2_7 import KimiK25StateDictAdapter

    twin = small("kimi_k25", **overrides)
    config = titan_kimi_config(twin)
    adapter = KimiK25StateDictAdapter(config, None)
    model = randomise(built(config, eps=twin.config.text_config.rms_norm_eps))
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    source = published(tmp_path / "hf", twin, adapter.to_hf(own))
    hf = type(twin).from_pretrained(source, attn_implementation="eager").eval()

    assert check(source, to=KIMI)
    convert(source, tmp_path / "titan.pth", to=KIMI)
    found = torch_tensors(tmp_path / "titan.pth")
    assert_same(found, adapter.from_hf(hf_tensors(source)))
    assert_same(found, own)
    model.load_state_dict(found)
    for layer in model.layers.values():
        layer.attention.kv_norm.eps = 1e-6
        if hasattr(layer.attention, "q_norm"):
            layer.attention.q_norm.eps = 1e-6
    assert difference(model, hf) < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    written, read = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "back", source)
    )
    assert written["vision_config"] == read["vision_config"]


@pytest.mark.parametrize("overrides", MUSE_CASES)
def test_muse_glimmer_gives_the_logits_and_its_adapter_the_bytes(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    from torchtitan.models.muse_glimmer import MuseGlimmerStateDictAdapter

    hf = muse(**overrides)
    source = save_hf(hf, tmp_path / "hf")
    config = titan_muse_config(hf)
    adapter = MuseGlimmerStateDictAdapter(config, None)

    assert check(source, to=MUSE)
    convert(source, tmp_path / "titan.pth", to=MUSE)
    found = torch_tensors(tmp_path / "titan.pth")
    assert_same(found, adapter.from_hf(hf_tensors(source)))
    assert_same(hf_tensors(source), adapter.to_hf(found))
    text = hf.config.text_config
    model = built(config, eps=text.rms_norm_eps)
    model.load_state_dict(found)
    for layer, kind in zip(model.layers.values(), text.layer_types, strict=True):
        window = text.sliding_window if kind == "sliding_attention" else None
        layer.attention.inner_attention = Attend(window)
        layer.post_attention_norm.eps = layer.post_ffn_norm.eps = text.post_norm_eps
    assert difference(model, hf) < RIGHT

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize(
    ("made", "overrides", "to", "names"),
    [
        pytest.param(muse, {"attention_bias": True}, MUSE, {"qkv_bias", "o_bias"}, id="biases"),
        pytest.param(
            muse,
            {"hidden_activation": "gelu", "vision": {"hidden_act": "relu"}},
            MUSE,
            {"activation", "config.vision_config.hidden_act"},
            id="activations",
        ),
        pytest.param(muse, {"tie_word_embeddings": True}, MUSE, {"tied"}, id="tied"),
        pytest.param(
            muse,
            {},
            "hf-llama",
            {
                *("norm", "post_norms", "bare_norms", "attention_gate", "final_softcap"),
                *("no_rope_layers", "sliding_window", "layer_types", "logits_scaling"),
            },
            id="llama",
        ),
    ],
)
def test_what_the_target_cannot_compute_is_refused_by_name(
    tmp_path: Path, made: Any, overrides: dict[str, Any], to: str, names: set[str]
) -> None:
    source = save_hf(made(**overrides), tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to=to)
    refused = {str(v).split(":")[0] for name, v in raised.value.facts if name == "refused"}
    assert refused == names
