"""The tables against published models: every key and every element is accounted for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dcpconv.core.spec import Experts, LatentAttention, ModelSpec
from dcpconv.families.configs.ffn import ffn_width
from dcpconv.families.keymaps import keymaps
from dcpconv.sources.parameter_shapes import expected


def spec(d: int, layers: int, heads: int, groups: int, ffn: int, **more: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "vocab_size": 6400,
        "hidden_size": d,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": groups,
        "head_dim": d // heads,
        "ffn_size": ffn,
        "max_seq_len": 512,
        "tied": True,
    }
    return ModelSpec(**sizes | more)


def experts(ffn: int, *, shared: int = 1, top: int = 2) -> Experts:
    width = ffn if shared else None
    return Experts(count=4, per_token=top, ffn_size=ffn, shared_count=shared, shared_ffn_size=width)


def old(d: int) -> int:
    """Width of the feed-forward block until generation 3."""
    return ffn_width(d, 64, None)


def new(d: int) -> int:
    """The same since generation 4."""
    return math.ceil(d * math.pi / 64) * 64


PUBLISHED = [
    pytest.param("minimind1", spec(512, 8, 16, 8, old(512)), 26.88, id="minimind-v1-small"),
    pytest.param("minimind1", spec(768, 16, 16, 8, old(768)), 108.75, id="minimind-v1"),
    pytest.param("minimind2", spec(512, 8, 8, 2, old(512)), 25.83, id="MiniMind2-Small"),
    pytest.param("minimind2", spec(768, 16, 8, 2, old(768)), 104.03, id="MiniMind2"),
    pytest.param(
        "minimind3",
        spec(640, 8, 8, 2, old(640), experts=experts(old(640))),
        145.03,
        id="MiniMind2-MoE",
    ),
    pytest.param("minimind4", spec(768, 8, 8, 4, new(768), qk_norm=True), 63.91, id="minimind-3"),
    pytest.param(
        "minimind4",
        spec(768, 8, 8, 4, new(768), qk_norm=True, experts=experts(new(768), shared=0, top=1)),
        198.42,
        id="minimind-3-moe",
    ),
]


@pytest.mark.parametrize(("family", "model", "millions"), PUBLISHED)
def test_minimind_has_as_many_parameters_as_its_readme_says(
    family: str, model: ModelSpec, millions: float
) -> None:
    keys = list(expected(keymaps()[family], model))
    assert round(sum(math.prod(shape or ()) for _, shape, _ in keys) / 1e6, 2) == millions


def test_the_tables_of_minimind_know_the_sizes_that_were_published() -> None:
    told = {
        (published["hidden_size"], published["n_layers"], published["n_heads"])
        for name in ("minimind1", "minimind2", "minimind3", "minimind4")
        for published in keymaps()[name].published
    }
    assert told == {
        (512, 8, 16),
        (768, 16, 16),
        (512, 8, 8),
        (640, 8, 8),
        (768, 16, 8),
        (768, 8, 8),
    }


def test_chatglm3_is_as_large_as_its_index_says() -> None:
    model = spec(
        4096, 28, 32, 2, 13_696, vocab_size=65_024, qkv_bias=True, tied=False,
        partial_rotary_factor=0.5,
    )  # fmt: skip
    keys = list(expected(keymaps()["chatglm3"], model))
    inv_freq = 32
    numel = sum(math.prod(shape or ()) for _, shape, _ in keys) + inv_freq
    # metadata.total_size of pytorch_model.bin.index.json, in fp16, and its 200 keys.
    assert 2 * numel == 12_487_168_064
    assert len(keys) + 1 == 200


def test_deepseek_v3_has_671_billion_parameters() -> None:
    model = spec(
        7168, 61, 128, 128, 18_432, vocab_size=129_280, head_dim=64, tied=False,
        latent=LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, value_dim=128),
        experts=Experts(
            count=256, per_token=8, ffn_size=2048, shared_count=1, shared_ffn_size=2048,
            dense_layers=(0, 1, 2), scoring="sigmoid", selection_bias=True,
        ),
    )  # fmt: skip
    disk = list(expected(keymaps()["hf-deepseek_v3"], model))
    live = list(expected(keymaps()["hf-memory-deepseek_v3"], model))
    counts = [sum(math.prod(shape or ()) for _, shape, _ in keys) for keys in (disk, live)]
    assert counts[0] == counts[1]
    assert round(counts[0] / 1e9) == 671
