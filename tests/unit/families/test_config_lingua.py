"""Lingua's params.json, and the flat one of Meta's releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import Experts, ModelSpec, RopeScaling
from dcpconv.families.configs import find_config, lingua, read_spec, refusals, to_text, write_config

SPEC = ModelSpec(
    vocab_size=37,
    hidden_size=96,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    ffn_size=56,
    norm_eps=3e-6,
    rope_theta=490_000.0,
    max_seq_len=64,
    dtype="fp32",
)
LLAMA3 = RopeScaling(
    kind="llama3",
    parameters={
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


def change(changes: dict[str, Any]) -> ModelSpec:
    return ModelSpec.model_validate(dict(SPEC) | changes)


def save(directory: Path, fields: dict[str, Any]) -> Path:
    (directory / "params.json").write_text(json.dumps(fields))
    return directory


@st.composite
def expressible(draw: st.DrawFn) -> ModelSpec:
    n_kv_heads = draw(st.integers(1, 9))
    n_heads = n_kv_heads * draw(st.integers(1, 9))
    max_seq_len = draw(st.integers(1, 2**20))
    return ModelSpec(
        vocab_size=draw(st.integers(1, 300_000)),
        hidden_size=n_heads * draw(st.integers(1, 200)),
        n_layers=draw(st.integers(1, 200)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.integers(1, 300)),
        ffn_size=draw(st.integers(1, 131_072)),
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        rope_theta=draw(st.floats(1.0, 1e9)),
        max_seq_len=max_seq_len,
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        origin="lingua",
    )


@settings(max_examples=500)
@given(spec=expressible())
def test_what_we_write_reads_back_to_the_same_spec(spec: ModelSpec) -> None:
    fields = json.loads(to_text(write_config("lingua", spec)))
    assert refusals("lingua", spec) == ()
    assert lingua.read(fields, Path("params.json")) == spec


def test_a_window_is_kept_even_if_training_does_not_heed_it(tmp_path: Path) -> None:
    spec = change({"architecture": "mistral", "sliding_window": 16, "origin": "lingua"})
    assert read_spec(save(tmp_path, write_config("lingua", spec))) == spec


def test_what_generate_and_eval_look_up_is_there() -> None:
    fields: dict[str, Any] = write_config("lingua", SPEC, tokenizer=("sp", "tokenizer.model"))
    assert fields["distributed"]["model_dtype"] == "fp32"
    assert fields["data"]["tokenizer"] == {"name": "sp", "path": "tokenizer.model"}
    assert fields["data"]["sources"] == {}
    assert fields["data"]["root_dir"] is None
    assert isinstance(fields["model"]["max_seqlen"], int)


# Lingua's TrainArgs at facebookresearch/lingua@437d680: a strict reader takes these and no others.
TRAIN_ARGS: dict[str, Any] = {
    "": "name dump_dir seed grad_acc_steps gc_collect_freq probe_freq steps data optim model "
    "distributed env checkpoint profiling logging async_eval_gpus eval",
    "data": "root_dir sources batch_size seq_len n_views seed add_bos add_eos load_async "
    "prefetch_size tokenizer",
    "optim": "lr weight_decay epsilon beta1 beta2 clip scheduler warmup lr_min_ratio cycle_length "
    "cosine_theta annealing_step decay_fraction exp_factor",
    "model": "dim n_layers head_dim n_heads n_kv_heads ffn_dim_multiplier multiple_of norm_eps "
    "rope_theta init_base_std init_std_factor max_seqlen seed vocab_size weight_tying "
    "sliding_window",
    "distributed": "dp_shard dp_replicate tp_size selective_activation_checkpointing compile "
    "fsdp_type model_dtype float8_recipe float8_filter matmul_allow_tf32 detect_anomaly "
    "compile_cache_size_limit spawn_method",
    "checkpoint": "dump eval path init_ckpt_path continue_training_from_init",
    "profiling": "run trace_folder mem_warmup mem_steps profile_warmup profile_steps",
    "logging": "freq acc_freq wandb",
}


@pytest.mark.parametrize("section", TRAIN_ARGS, ids=lambda name: name or "top")
def test_there_is_every_field_of_train_args_and_no_other(section: str) -> None:
    fields: dict[str, Any] = write_config("lingua", SPEC)
    names = fields[section] if section else fields
    assert list(names) == TRAIN_ARGS[section].split()


@pytest.mark.parametrize(
    ("given_dtype", "spec_dtype", "written"),
    [
        pytest.param(None, "fp16", "fp16", id="of-the-spec"),
        pytest.param("torch.bfloat16", "fp16", "bf16", id="asked-for"),
        pytest.param(None, None, "bf16", id="of-lingua"),
    ],
)
def test_dtype(given_dtype: str | None, spec_dtype: str | None, written: str) -> None:
    fields: dict[str, Any] = write_config(
        "lingua", change({"dtype": spec_dtype}), dtype=given_dtype
    )
    assert fields["distributed"]["model_dtype"] == written


@pytest.mark.parametrize("dtype", ["fp64", "f8e4m3", "float8_e4m3fn", "nonsense"])
def test_a_dtype_that_generate_does_not_know_is_an_error(dtype: str) -> None:
    with pytest.raises(SpecError) as raised:
        write_config("lingua", SPEC, dtype=dtype)
    assert raised.value.facts == (("found", dtype), ("expected", "fp32 or fp16 or bf16"))


def test_the_context_of_a_long_model_does_not_become_the_length_of_a_batch() -> None:
    fields: dict[str, Any] = write_config("lingua", change({"max_seq_len": 131_072}))
    assert fields["data"]["seq_len"] == 2048
    assert fields["model"]["max_seqlen"] == 131_072


def test_an_unknown_vocabulary_cannot_be_written() -> None:
    for family in ("lingua", "hf"):
        with pytest.raises(SpecError, match="vocab_size"):
            write_config(family, change({"vocab_size": None}))


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        pytest.param(
            {"rope_scaling": LLAMA3},
            ["rope_scaling: llama3, factor 32.0: Lingua computes plain RoPE from rope_theta"],
            id="rope_scaling",
        ),
        pytest.param(
            {"sliding_window": 16},
            [
                (
                    "sliding_window: 16 of 64 tokens: Lingua heeds its sliding_window only with "
                    "attn_impl=fmha, not in training"
                ),
            ],
            id="sliding_window",
        ),
        pytest.param({"sliding_window": 64}, [], id="window-that-does-not-bite"),
        pytest.param(
            {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True},
            [
                "qkv_bias: on q, k and v: wq, wk and wv have no bias in Lingua",
                "o_bias: on the attention output: wo has no bias in Lingua",
                "mlp_bias: on gate, up and down: w1, w2 and w3 have no bias in Lingua",
                "qk_norm: on q and k: Lingua does not normalise q and k",
            ],
            id="all-at-once",
        ),
        pytest.param(
            {"activation": "gelu"},
            ["activation: gelu: Lingua's feed-forward is SiLU only"],
            id="activation",
        ),
        pytest.param(
            {"embedding_multiplier": 12.0},
            ["embedding_multiplier: 12.0: Lingua has no such factor"],
            id="multiplier",
        ),
        pytest.param(
            {"experts": Experts(count=5, per_token=2, ffn_size=8)},
            ["experts: 5 experts, 2 per token: Lingua has no experts"],
            id="experts",
        ),
        pytest.param(
            {"n_heads": 10},
            ["n_heads: 10: Lingua asserts that they divide dim 96, whatever the head_dim"],
            id="heads-that-do-not-divide-dim",
        ),
        pytest.param({"head_dim": 24, "tied": True}, [], id="wide-heads-and-tying-are-fine"),
    ],
)
def test_refusals(changes: dict[str, Any], reasons: list[str]) -> None:
    assert [f"{r.name}: {r.reason}" for r in refusals("lingua", change(changes))] == reasons


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(
            {"n_heads": 8},
            {
                "hidden_size": 512,
                "n_layers": 8,
                "n_kv_heads": 8,
                "head_dim": 64,
                "ffn_size": 1536,
                "norm_eps": 1e-5,
                "rope_theta": 10_000.0,
                "max_seq_len": 1024,
                "vocab_size": None,
                "tied": False,
                "sliding_window": None,
            },
            id="defaults",
        ),
        pytest.param(
            {"head_dim": 32}, {"n_heads": 16, "n_kv_heads": 16, "head_dim": 32}, id="head_dim-only"
        ),
        pytest.param(
            {"head_dim": 32, "n_heads": 0, "n_kv_heads": 4},
            {"n_heads": 16, "n_kv_heads": 4},
            id="zero-is-not-given",
        ),
        pytest.param(
            {"head_dim": 32, "n_heads": 4}, {"n_heads": 4, "head_dim": 32}, id="both-given"
        ),
        pytest.param(
            {"n_heads": 8, "dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
            {"ffn_size": 14336},
            id="ffn",
        ),
        pytest.param(
            {"n_heads": 8, "sliding_window": 100},
            {"architecture": "mistral", "sliding_window": 100},
            id="window",
        ),
        pytest.param({"n_heads": 8, "rope_scaling": {"factor": 8}}, {"rope_scaling": None},
                     id="unknown-fields-mean-nothing-to-lingua-either"),
    ],
)  # fmt: skip
def test_reading(tmp_path: Path, model: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = read_spec(save(tmp_path, {"model": model}))
    assert {name: getattr(spec, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "headline", "facts"),
    [
        pytest.param(
            {"model": {"dim": 64}},
            "neither head_dim nor n_heads is given",
            ["model.head_dim", "model.n_heads"],
            id="no-heads",
        ),
        pytest.param(
            {"model": {"n_heads": 4, "dim": "64", "norm_eps": -1.0, "max_seqlen": 2.5}},
            "parameter file has 3 fields that cannot be used",
            [
                "dim: expected a valid integer, found '64'",
                "norm_eps: expected greater than 0, found -1.0",
                "max_seqlen: expected a valid integer, found 2.5",
            ],
            id="three-at-once",
        ),
        pytest.param(
            {"model": {"n_heads": 4, "n_kv_heads": 3}},
            "parameter file has 1 field that cannot be used",
            ["4 heads cannot share 3 kv heads evenly"],
            id="heads-do-not-divide",
        ),
        pytest.param(
            {"model": {"n_heads": 1024}},
            "parameter file has 1 field that cannot be used",
            ["head_dim: expected greater than or equal to 1, found 0"],
            id="more-heads-than-channels",
        ),
        pytest.param(
            {"model": {"head_dim": 1024}},
            "parameter file has 2 fields that cannot be used",
            [
                "n_heads: expected greater than or equal to 1, found 0",
                "n_kv_heads: expected greater than or equal to 1, found 0",
            ],
            id="head-wider-than-the-model",
        ),
    ],
)
def test_bad_fields_are_named(
    tmp_path: Path, fields: dict[str, Any], headline: str, facts: list[str]
) -> None:
    with pytest.raises(SpecError) as raised:
        read_spec(save(tmp_path, fields))
    assert raised.value.headline == headline
    assert raised.value.facts == (
        ("file", tmp_path / "params.json"),
        *(("field", fact) for fact in facts),
    )


# General knowledge of the published files; what each becomes is what Hugging Face publishes.
META = [
    pytest.param(
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06,
         "vocab_size": -1},
        {"ffn_size": 11008, "n_kv_heads": 32, "rope_theta": 1e4, "max_seq_len": 2048,
         "vocab_size": None},
        id="Llama-1-7B",
    ),
    pytest.param(
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
         "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        {"ffn_size": 28672, "n_kv_heads": 8, "max_seq_len": 4096},
        id="Llama-2-70B",
    ),
    pytest.param(
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
         "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05,
         "rope_theta": 500000.0},
        {"ffn_size": 14336, "vocab_size": 128256, "rope_theta": 5e5, "max_seq_len": 8192,
         "rope_scaling": None},
        id="Llama-3-8B",
    ),
    pytest.param(
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
         "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-05,
         "rope_theta": 500000.0, "use_scaled_rope": True},
        {"ffn_size": 8192, "head_dim": 64, "max_seq_len": 131072, "rope_scaling": LLAMA3},
        id="Llama-3.2-1B",
    ),
    pytest.param(
        {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
         "n_kv_heads": 8, "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000},
        {"architecture": "mistral", "ffn_size": 14336, "sliding_window": 4096,
         "max_seq_len": 32768},
        id="Mistral-7B-v0.1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), META)
def test_releases_of_meta(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = read_spec(save(tmp_path, fields))
    assert {name: getattr(spec, name) for name in expected} == expected


def test_llama_3_1_stretches_eightfold(tmp_path: Path) -> None:
    fields = {"dim": 4096, "n_layers": 32, "n_heads": 32, "use_scaled_rope": True}
    spec = read_spec(save(tmp_path, fields))
    assert spec.features() == {"rope_scaling": "llama3, factor 8.0"}


def test_a_config_json_beside_it_says_more(tmp_path: Path) -> None:
    save(tmp_path, {"dim": 4096, "n_layers": 32, "n_heads": 32})
    (tmp_path / "config.json").write_text("{}")
    assert find_config(tmp_path) == tmp_path / "config.json"
