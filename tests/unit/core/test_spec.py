"""ModelSpec: what it accepts, which axes it has, and what it calls a feature."""

from __future__ import annotations

import pytest

from dcpconv.core.record import ValidationError
from dcpconv.core.spec import FEATURES, Experts, LatentAttention, ModelSpec, RopeScaling

SPEC = ModelSpec(
    vocab_size=37,
    hidden_size=48,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=10,
    ffn_size=28,
    max_seq_len=64,
)
EXPERTS = Experts(count=5, per_token=2, ffn_size=14)


def test_a_plain_spec_has_the_axes_of_a_llama_and_no_features() -> None:
    assert SPEC.axes() == {
        "V": 37,
        "d": 48,
        "L": 3,
        "h": 6,
        "g": 2,
        "e": 10,
        "two": 2,
        "p": 5,
        "f": 28,
        "r": 3,
        "t": 64,
    }
    assert SPEC.features() == {}


@pytest.mark.parametrize(
    ("changes", "added", "removed"),
    [
        pytest.param({"vocab_size": None}, {}, {"V"}, id="vocab-unknown"),
        pytest.param({"head_dim": 9}, {"e": 9}, {"two", "p"}, id="odd-head-has-no-halves"),
        pytest.param({"experts": EXPERTS}, {"E": 5, "m": 14, "S": 0, "s": 0}, set(), id="experts"),
        pytest.param(
            {"experts": Experts(**{**dict(EXPERTS), "shared_count": 1, "shared_ffn_size": 9})},
            {"E": 5, "m": 14, "S": 1, "s": 9},
            set(),
            id="shared-experts",
        ),
    ],
)
def test_axes_are_those_that_are_known(
    changes: dict[str, object], added: dict[str, int], removed: set[str]
) -> None:
    expected = {name: n for name, n in (SPEC.axes() | added).items() if name not in removed}
    assert SPEC.model_copy(update=changes).axes() == expected


@pytest.mark.parametrize(
    ("changes", "features"),
    [
        pytest.param(
            {"rope_scaling": RopeScaling(kind="llama3", parameters={"factor": 32.0})},
            {"rope_scaling": "llama3, factor 32.0"},
            id="rope_scaling",
        ),
        pytest.param(
            {"rope_scaling": RopeScaling(kind="longrope")},
            {"rope_scaling": "longrope"},
            id="rope_scaling-without-factor",
        ),
        pytest.param(
            {"partial_rotary_factor": 0.5},
            {"partial_rotary": "0.5 of each head"},
            id="partial_rotary",
        ),
        pytest.param(
            {"sliding_window": 63}, {"sliding_window": "63 of 64 tokens"}, id="window-bites"
        ),
        pytest.param({"sliding_window": 64}, {}, id="window-as-long-as-the-sequence"),
        pytest.param({"layer_types": ("full",) * 3}, {}, id="layers-alike"),
        pytest.param(
            {"layer_types": ("sliding", "full", "sliding")},
            {"layer_types": "full, sliding"},
            id="layer_types",
        ),
        pytest.param({"qkv_bias": True}, {"qkv_bias": "on q, k and v"}, id="qkv_bias"),
        pytest.param({"o_bias": True}, {"o_bias": "on the attention output"}, id="o_bias"),
        pytest.param({"mlp_bias": True}, {"mlp_bias": "on gate, up and down"}, id="mlp_bias"),
        pytest.param({"head_bias": True}, {"head_bias": "on the logits"}, id="head_bias"),
        pytest.param(
            {"latent": LatentAttention(q_rank=9, kv_rank=7, nope_dim=4, value_dim=6, bias=True)},
            {"latent_attention": "rank 7", "latent_bias": "on the projections into ranks"},
            id="latent_bias",
        ),
        pytest.param({"qk_norm": True}, {"qk_norm": "on q and k"}, id="qk_norm"),
        pytest.param({"norm": "layernorm"}, {"norm": "layernorm"}, id="norm"),
        pytest.param(
            {"post_norms": True},
            {"post_norms": "after attention and feed-forward"},
            id="post_norms",
        ),
        pytest.param({"activation": "gelu"}, {"activation": "gelu"}, id="activation"),
        pytest.param({"attn_logit_softcap": 50.0}, {"attn_softcap": "50.0"}, id="attn_softcap"),
        pytest.param({"final_logit_softcap": 30.0}, {"final_softcap": "30.0"}, id="final_softcap"),
        pytest.param({"query_multiplier": 10**-0.5}, {}, id="the-usual-query-multiplier"),
        pytest.param(
            {"query_multiplier": 0.25}, {"query_multiplier": "0.25"}, id="query_multiplier"
        ),
        pytest.param(
            {"embedding_multiplier": 12.0},
            {"embedding_multiplier": "12.0"},
            id="embedding_multiplier",
        ),
        pytest.param(
            {"residual_multiplier": 0.22},
            {"residual_multiplier": "0.22"},
            id="residual_multiplier",
        ),
        pytest.param({"logits_scaling": 8.0}, {"logits_scaling": "8.0"}, id="logits_scaling"),
        pytest.param({"experts": EXPERTS}, {"experts": "5 experts, 2 per token"}, id="experts"),
    ],
)
def test_only_what_is_not_neutral_is_a_feature(
    changes: dict[str, object], features: dict[str, str]
) -> None:
    assert ModelSpec.model_validate(dict(SPEC) | changes).features() == features


@pytest.mark.parametrize(
    ("condition", "answers"),
    [
        pytest.param("", (True, True), id="always"),
        pytest.param("dense", (True, False), id="of-one-layer"),
        pytest.param("dense & mlp_bias", (True, False), id="both-in-one-layer"),
        pytest.param("mlp_bias&shared_experts", (False, True), id="without-spaces"),
        pytest.param("moe & qkv_bias", (False, False), id="one-of-two"),
        pytest.param("tied & mlp_bias & moe", (False, True), id="three"),
        pytest.param("untied & mlp_bias", (False, False), id="untied"),
    ],
)
def test_a_condition_of_several_words_asks_for_all_of_them(
    condition: str, answers: tuple[bool, bool]
) -> None:
    experts = Experts(
        count=5, per_token=2, ffn_size=14, shared_count=1, shared_ffn_size=9, dense_layers=(0,)
    )
    spec = SPEC.model_copy(update={"experts": experts, "mlp_bias": True, "tied": True})
    assert (spec.has(condition, 0), spec.has(condition, 1)) == answers


@pytest.mark.parametrize(
    ("spelling", "label"),
    [("bf16", "bf16"), ("bfloat16", "bf16"), ("torch.float32", "fp32"), (None, None)],
)
def test_dtype_becomes_our_label(spelling: str | None, label: str | None) -> None:
    assert ModelSpec.model_validate(dict(SPEC) | {"dtype": spelling}).dtype == label


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"n_kv_heads": 4}, id="heads-do-not-divide"),
        pytest.param({"hidden_size": 0}, id="empty-axis"),
        pytest.param({"n_layers": 10**9}, id="absurd-layers"),
        pytest.param({"hidden_size": 48.0}, id="float-size"),
        pytest.param({"hidden_size": True}, id="bool-size"),
        pytest.param({"norm_eps": float("nan")}, id="nan"),
        pytest.param({"rope_theta": float("inf")}, id="infinity"),
        pytest.param({"layer_types": ("full",)}, id="too-few-layer-types"),
        pytest.param({"dtype": "bf17"}, id="unknown-dtype"),
        pytest.param({"colour": "red"}, id="unknown-field"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(dict(SPEC) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"per_token": 6}, id="more-than-there-are"),
        pytest.param({"shared_count": 1}, id="shared-without-width"),
        pytest.param({"shared_ffn_size": 9}, id="width-without-shared"),
    ],
)
def test_experts_agree_with_themselves(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Experts.model_validate(dict(EXPERTS) | changes)


def test_a_spec_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        SPEC.tied = True  # type: ignore[misc]


def test_every_feature_has_a_name_that_can_be_allowed() -> None:
    from docs.families_page import _FEATURES

    assert set(_FEATURES) == FEATURES
