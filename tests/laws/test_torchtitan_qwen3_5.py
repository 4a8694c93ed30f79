"""torchtitan's own Qwen3.5: the logits of the Hugging Face model, the bytes of its adapter.

Three parts are replaced so that the package computes on a CPU in fp32: the attention kernel, the
recurrence of linear attention (by the one of transformers), and the grouped product.

The adapter takes a published stack of experts for its transpose, so that it is an oracle only for
models without experts; those with experts are held to the logits.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

# Here, since both modules choose their kernels when they are imported.
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe  # noqa: F401

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from support.checkpoints.families import RIGHT, TOKENS, assert_same, hf_tensors, torch_tensors
from support.models.hf_models import save_hf
from support.models.nested_models import LINEAR, QWEN_VISION, ROUTED, TEXT, nested

pytest.importorskip("torchtitan", reason="needs .[interop]")

DENSE, SPARSE = "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"
SMALL = {**TEXT, **LINEAR}
MIXED = {**SMALL, **ROUTED}
CASES = [
    pytest.param(DENSE, "qwen3_5", SMALL, id="dense"),
    pytest.param(DENSE, "qwen3_5", {**SMALL, "linear_num_value_heads": 3}, id="one-value-head"),
    pytest.param(
        DENSE,
        "qwen3_5",
        {
            **SMALL,
            "num_hidden_layers": 11,
            "layer_types": None,
            "full_attention_interval": 3,
            "head_dim": 24,
        },
        id="eleven-layers-by-interval",
    ),
    pytest.param(DENSE, "qwen3_5", {**SMALL, "layer_types": ["full_attention"] * 4}, id="all-full"),
    pytest.param(
        DENSE, "qwen3_5", {**SMALL, "layer_types": ["linear_attention"] * 4}, id="all-linear"
    ),
    pytest.param(SPARSE, "qwen3_5_moe", MIXED, id="experts"),
    pytest.param(
        SPARSE,
        "qwen3_5_moe",
        {**MIXED, "num_experts": 12, "shared_expert_intermediate_size": 52},
        id="twelve-experts",
    ),
]


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of a GPU, which the package imports whatever it runs on."""
    names = ["torchtitan.distributed.minimal_async_ep.kernels"]
    if importlib.util.find_spec("fla") is None:
        names += ["fla", "fla.modules", "fla.modules.conv", "fla.modules.conv.triton"]
        names += ["fla.modules.conv.triton.ops", "fla.ops", "fla.ops.gated_delta_rule"]
        names += ["fla.ops.gated_delta_rule.chunk", "fla.ops.gated_delta_rule.fused_recurrent"]
    if importlib.util.find_spec("triton") is None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, MagicMock())


class _Attend(nn.Module):
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Any,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor:
        del attention_masks
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)


class _Recur(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **_: Any
    ) -> Tensor:
        times = v.shape[2] // q.shape[2]
        q, k = q.repeat_interleave(times, dim=2), k.repeat_interleave(times, dim=2)
        out = torch_chunk_gated_delta_rule(
            q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
        )
        return torch.as_tensor(out[0])


def _in_fp32(self: Any, x: Tensor, counts: Tensor) -> Tensor:
    parts = torch.split(x, counts.int().tolist())
    weights = zip(parts, self.w1_EFD, self.w3_EFD, self.w2_EDF, strict=True)
    return torch.cat(
        [(functional.silu(part @ w1.T) * (part @ w3.T)) @ w2.T for part, w1, w3, w2 in weights]
    )


def titan_config(hf: Any) -> Any:
    """What torchtitan's config says of the same model."""
    from torchtitan.models.common import Embedding, Linear
    from torchtitan.models.qwen3_5 import (
        Qwen35Model,
        _build_qwen35_layers,
        _build_qwen35_moe_layers,
        _offset_norm,
        _qwen35_vision_encoder_config,
    )
    from torchtitan.models.qwen3_5.rope import MRoPE

    text, vision = hf.config.text_config, hf.config.vision_config
    turned = int(text.head_dim * text.rope_parameters["partial_rotary_factor"])
    theta = text.rope_parameters["rope_theta"]
    half = turned // 2
    shared: dict[str, Any] = {
        "n_layers": text.num_hidden_layers,
        "dim": text.hidden_size,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "rotary_dim": turned,
        "rope": MRoPE.Config(dim=turned, max_seq_len=64, theta=theta, mrope_section=[half, 0, 0]),
        "n_key_heads": text.linear_num_key_heads,
        "n_value_heads": text.linear_num_value_heads,
        "key_head_dim": text.linear_key_head_dim,
        "value_head_dim": text.linear_value_head_dim,
        "attn_backend": "flex",
    }

    def layers(interval: int) -> Any:
        more = {**shared, "full_attention_interval": interval}
        if hasattr(text, "num_experts"):
            return _build_qwen35_moe_layers(
                moe_hidden_dim=text.moe_intermediate_size,
                num_experts=text.num_experts,
                top_k=text.num_experts_per_tok,
                shared_expert_hidden_dim=text.shared_expert_intermediate_size,
                **more,
            )
        return _build_qwen35_layers(hidden_dim=text.intermediate_size, **more)

    full, linear = layers(1), layers(99)
    chosen = [
        (full if word == "full_attention" else linear)[n] for n, word in enumerate(text.layer_types)
    ]
    for layer in chosen:
        if layer.delta_net is not None:
            kernel = text.linear_conv_kernel_dim
            layer.delta_net.conv_kernel_size = kernel
            for name in "qkv":
                getattr(layer.delta_net, f"conv_{name}").kernel_size = kernel
    dim, vocab = text.hidden_size, text.vocab_size
    return Qwen35Model.Config(
        vocab_size=vocab,
        dim=dim,
        norm=_offset_norm(dim),
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim),
        lm_head=Linear.Config(in_features=dim, out_features=vocab),
        layers=chosen,
        enable_weight_tying=hf.config.tie_word_embeddings,
        vision_encoder=_qwen35_vision_encoder_config(
            dim=vision.hidden_size,
            ffn_dim=vision.intermediate_size,
            num_layers=vision.depth,
            num_heads=vision.num_heads,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            out_hidden_size=vision.out_hidden_size,
            num_position_embeddings=vision.num_position_embeddings,
        ),
    )


def titan(hf: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that torchtitan builds, without weights."""
    from torchtitan.models.common.moe import GroupedExperts

    monkeypatch.setattr(GroupedExperts, "forward", _in_fp32)
    model = titan_config(hf).build().eval()
    for module in model.modules():
        if hasattr(module, "inner_attention"):
            module.inner_attention = _Attend()
        if hasattr(module, "kernel") and hasattr(module, "A_log"):
            module.kernel = _Recur()
    return model


def difference(titan: Any, hf: Any) -> float:
    """Largest |logit difference| over the logits' standard deviation, which is about 2 here; row by
    row, since torchtitan packs rows into one stream."""
    worst = 0.0
    with torch.no_grad():
        for row in TOKENS:
            positions = torch.arange(len(row))[None]
            special = {"image_id": -1, "video_id": -1}
            found = titan(row[None], positions=positions, special_tokens=special)
            expected = hf(row[None], use_cache=False).logits
            worst = max(worst, float((found - expected).abs().max() / expected.std()))
    return worst


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("name", "model_type", "text"), CASES)
def test_torchtitan_gives_the_logits_and_its_adapter_the_bytes(
    tmp_path: Path,
    name: str,
    model_type: str,
    text: dict[str, Any],
    *,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchtitan.models.qwen3_5 import Qwen35StateDictAdapter

    hf = nested(
        name,
        model_type,
        {**text, "tie_word_embeddings": tied},
        vision_config=dict(QWEN_VISION),
        tie_word_embeddings=tied,
    )
    source = save_hf(hf, tmp_path / "hf")
    assert check(source, to="torchtitan-qwen3_5")
    report = convert(source, tmp_path / "titan.pth", to="torchtitan-qwen3_5")
    assert report.target.family == "torchtitan-qwen3_5"
    found = torch_tensors(tmp_path / "titan.pth")

    model = titan(hf, monkeypatch)
    model.load_state_dict(found)
    assert difference(model, hf) < RIGHT

    if model_type == "qwen3_5":
        adapter = Qwen35StateDictAdapter(titan_config(hf), None)
        assert_same(found, adapter.from_hf(hf_tensors(source)))
        assert_same(hf_tensors(source), adapter.to_hf(found))

    convert(tmp_path / "titan.pth", tmp_path / "back", form="hf", assets=source)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    assert check(tmp_path / "titan.pth", to=f"hf-{model_type}", assets=source)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        pytest.param({"attention_bias": True}, {"qkv_bias", "o_bias"}, id="biases"),
        pytest.param(
            {"hidden_act": "gelu", "rms_norm_eps": 1e-5}, {"activation", "norm_eps"}, id="two"
        ),
        pytest.param(
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "linear",
                    "factor": 2.0,
                    "partial_rotary_factor": 0.25,
                }
            },
            {"rope_scaling"},
            id="scaled",
        ),
    ],
)
def test_what_torchtitan_cannot_compute_is_refused_by_name(
    tmp_path: Path, overrides: dict[str, Any], names: set[str]
) -> None:
    hf = nested(DENSE, "qwen3_5", {**SMALL, **overrides}, vision_config=dict(QWEN_VISION))
    source = save_hf(hf, tmp_path / "hf")
    with pytest.raises(NotExpressibleError) as raised:
        convert(source, tmp_path / "out", to="torchtitan-qwen3_5")
    refused = {str(v).split(":")[0] for label, v in raised.value.facts if label == "refused"}
    assert refused == names
    assert {fault.key for fault in check(source, to="torchtitan-qwen3_5").refused} == names
