"""config.json: what transformers itself makes of the same file is what we must make of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dcpconv.core.errors import NotExpressibleError, SpecError
from dcpconv.core.spec import ModelSpec, RopeScaling
from dcpconv.families.configs import (
    find_config,
    hf,
    lingua,
    read_spec,
    refusals,
    to_text,
    write_config,
)
from dcpconv.families.configs.model_types import MODEL_TYPES

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 96,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
LLAMA3: dict[str, Any] = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def save(directory: Path, fields: dict[str, Any], name: str = "config.json") -> Path:
    (directory / name).write_text(json.dumps(fields))
    return directory


def spec_of(directory: Path, **fields: Any) -> ModelSpec:
    return read_spec(save(directory, {"model_type": "llama"} | SIZES | fields))


def as_written(value: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(value) if isinstance(value, tuple) else value


def assert_same_model(spec: ModelSpec, config: Any) -> None:
    """``spec`` says what transformers' ``config`` says."""
    head_dim = getattr(config, "head_dim", None)
    assert spec.architecture == config.model_type
    assert spec.vocab_size == config.vocab_size
    assert spec.hidden_size == config.hidden_size
    assert spec.ffn_size == config.intermediate_size
    assert spec.n_layers == config.num_hidden_layers
    assert spec.n_heads == config.num_attention_heads
    if spec.latent is None:
        assert spec.n_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    eps = config.layer_norm_eps if config.model_type == "cohere" else config.rms_norm_eps
    assert spec.norm_eps == eps
    assert spec.max_seq_len == config.max_position_embeddings
    assert spec.tied == config.tie_word_embeddings
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    assert spec.partial_rotary_factor == partial
    kind = config.rope_parameters["rope_type"]
    assert (spec.rope_scaling.kind if spec.rope_scaling else "default") == kind
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    assert spec.activation == activation
    assert spec.bos_token_id == config.bos_token_id
    assert as_written(spec.eos_token_id) == config.eos_token_id
    assert spec.pad_token_id == config.pad_token_id
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        window = None
    assert spec.sliding_window == window
    if types is not None and len(set(types)) > 1:
        assert spec.layer_types == tuple(types)
    assert spec.attn_logit_softcap == getattr(config, "attn_logit_softcapping", None)
    assert spec.final_logit_softcap == getattr(config, "final_logit_softcapping", None)
    assert (spec.dtype is None) == (config.dtype is None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_left_out_is_what_the_class_says(tmp_path: Path, model_type: str) -> None:
    # Head counts must divide for the classes whose default number of kv heads is large.
    heads = 20 if model_type == "helium" else 32
    sizes = SIZES | {"num_attention_heads": heads, "hidden_size": 8 * heads}
    directory = save(tmp_path, {"model_type": model_type} | sizes)
    config = transformers.AutoConfig.from_pretrained(directory)
    spec = read_spec(directory)

    assert_same_model(spec, config)
    model = transformers.AutoModelForCausalLM
    assert MODEL_TYPES[model_type].class_name == model._model_mapping[type(config)].__name__
    if spec.experts is not None:
        counts = ("num_experts", "num_local_experts", "n_routed_experts")
        assert spec.experts.count in {getattr(config, name, None) for name in counts}
        assert spec.experts.per_token == config.num_experts_per_tok
        assert spec.experts.ffn_size == getattr(
            config, "moe_intermediate_size", config.intermediate_size
        )


@pytest.mark.parametrize(
    ("model_type", "slot", "names"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias", "o_bias", "mlp_bias"}),
        ("mistral", {}, set()),
        ("qwen2", {}, {"qkv_bias"}),
        ("qwen3", {}, {"qk_norm"}),
        ("qwen3", {"attention_bias": True}, {"qk_norm", "qkv_bias", "o_bias"}),
        ("glm", {"head_dim": 16, "pad_token_id": 0}, {"qkv_bias"}),
        ("granite", {"attention_multiplier": 0.0625}, set()),
        ("gemma2", {"head_dim": 16}, {"post_norms"}),
        ("gemma2", {"head_dim": 16, "attention_bias": True}, {"post_norms", "qkv_bias", "o_bias"}),
        ("mistral", {"attention_bias": True, "mlp_bias": True, "use_bias": True}, set()),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias"}),
    ],
)
def test_features_are_the_tensors_of_the_real_model(
    tmp_path: Path, model_type: str, slot: dict[str, Any], names: set[str]
) -> None:
    sizes = SIZES | {"num_key_value_heads": 2} | slot
    directory = save(tmp_path, {"model_type": model_type} | sizes)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config)
    keys = model.state_dict().keys()
    endings = {
        "qkv_bias": "q_proj.bias",
        "o_bias": "o_proj.bias",
        "mlp_bias": "down_proj.bias",
        "qk_norm": "q_norm.weight",
        "post_norms": "pre_feedforward_layernorm.weight",
    }
    shown = {name for name, end in endings.items() if any(key.endswith(end) for key in keys)}

    spec = read_spec(directory)
    assert shown == names
    assert {name for name in spec.features() if name in endings} == names
    multiplier = spec.query_multiplier or spec.head_dim**-0.5
    assert multiplier == model.model.layers[0].self_attn.scaling


FOUR = {
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
    "torch_dtype": "bfloat16",
}
FIVE = {
    "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0},
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("style", [pytest.param(FOUR, id="v4"), pytest.param(FIVE, id="v5")])
def test_both_styles_say_the_same(tmp_path: Path, style: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, **style)
    assert spec.rope_theta == 500000.0
    assert spec.dtype == "bf16"
    assert spec.rope_scaling == RopeScaling(kind="llama3", parameters=LLAMA3)
    assert spec.features() == {"rope_scaling": "llama3, factor 32.0"}
    assert spec.extra == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": RopeScaling(kind="linear", parameters={"factor": 2.0})},
            id="old-name-of-rope_type",
        ),
        pytest.param({"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}, id="none"),
        pytest.param(
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
                "rope_theta": 5.0,
            },
            {
                "rope_theta": 5.0,
                "rope_scaling": RopeScaling(kind="linear", parameters={"factor": 2.0}),
            },
            id="filled-rope_scaling-wins",
        ),
        pytest.param(
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
                    "other": None,
                }
            },
            {
                "rope_theta": 7.0,
                "rope_scaling": RopeScaling(kind="linear", parameters={"factor": 2.0}),
            },
            id="one-rope-per-layer-type",
        ),
        pytest.param({"max_sequence_length": 77}, {"max_seq_len": 77}, id="early-export"),
        pytest.param({"num_key_value_heads": None}, {"n_kv_heads": 6}, id="null-kv-heads"),
        pytest.param({"num_key_value_heads": 2}, {"n_kv_heads": 2}, id="kv-heads"),
        pytest.param({"head_dim": None}, {"head_dim": 16}, id="null-head_dim"),
        pytest.param({"head_dim": 24}, {"head_dim": 24}, id="head_dim"),
        pytest.param({"hidden_act": "swish"}, {"activation": "silu"}, id="swish"),
        pytest.param({"bos_token_id": None}, {"bos_token_id": None}, id="null-is-not-left-out"),
        pytest.param({"eos_token_id": [3, 4]}, {"eos_token_id": (3, 4)}, id="several-eos"),
        pytest.param({"torch_dtype": "auto"}, {"dtype": None}, id="auto-dtype"),
        pytest.param(
            {"model_type": "mistral", "num_key_value_heads": None},
            {"sliding_window": 4096, "n_kv_heads": 6},
            id="mistral-default",
        ),
        pytest.param(
            {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
            {"sliding_window": None, "n_kv_heads": 2},
            id="mistral-null-is-none",
        ),
        pytest.param(
            {"model_type": "qwen2", "num_key_value_heads": 6, "use_sliding_window": True,
             "max_window_layers": 3},
            {"sliding_window": None, "layer_types": None},
            id="qwen2-window-above-all-layers",
        ),
        pytest.param(
            {"model_type": "qwen2", "num_key_value_heads": 6, "use_sliding_window": True,
             "max_window_layers": 1},
            {
                "sliding_window": 4096,
                "layer_types": ("full_attention", "sliding_attention", "sliding_attention"),
            },
            id="qwen2-window-above-one-layer",
        ),
        pytest.param(
            {"model_type": None, "architectures": ["LLaMAForCausalLM"]},
            {"architecture": "llama", "tied": False},
            id="class-only",
        ),
        pytest.param(
            {"model_type": "novel", "max_position_embeddings": 9, "rms_norm_eps": 1e-3},
            {"architecture": "novel", "tied": True, "max_seq_len": 9, "norm_eps": 1e-3},
            id="unknown-type-is-read-generically",
        ),
        pytest.param(
            {"initializer_range": 0.5, "transformers_version": "4.57.6", "_name_or_path": "here"},
            {"extra": {"initializer_range": 0.5}},
            id="the-rest-is-carried-over",
        ),
    ],
)  # fmt: skip
def test_reading(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, **fields)
    assert {name: getattr(spec, name) for name in expected} == expected


LONGROPE = RopeScaling(
    kind="longrope",
    parameters={
        "factor": 2.0,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
    },
)
PLAIN = ModelSpec(
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
    dtype="bf16",
    bos_token_id=3,
    eos_token_id=(4, 5),
    origin="hf-llama",
)
SPECS = [
    pytest.param({}, id="plain"),
    pytest.param({"tied": True, "head_dim": 24, "n_kv_heads": 6}, id="tied-wide-heads"),
    pytest.param({"qkv_bias": True, "o_bias": True}, id="attention-biases"),
    pytest.param({"mlp_bias": True}, id="mlp-biases"),
    pytest.param({"rope_scaling": RopeScaling(kind="llama3", parameters=LLAMA3)}, id="llama3"),
    pytest.param({"rope_scaling": LONGROPE}, id="longrope"),
    pytest.param({"activation": "gelu"}, id="gelu"),
    pytest.param(
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": None},
        id="no-one-named-tokens",
    ),
    pytest.param({"extra": {"initializer_range": 0.5, "attention_dropout": 0.1}}, id="extra"),
    pytest.param({"architecture": "mistral"}, id="mistral"),
    pytest.param({"architecture": "mistral", "sliding_window": 16}, id="mistral-window"),
]


def change(changes: dict[str, Any]) -> ModelSpec:
    return ModelSpec.model_validate(dict(PLAIN) | changes)


@pytest.mark.parametrize("changes", SPECS)
def test_what_we_write_reads_back_to_the_same_spec(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = change(changes)
    assert refusals("hf", spec) == ()
    (tmp_path / "config.json").write_text(to_text(write_config("hf", spec)))
    assert read_spec(tmp_path) == spec


@pytest.mark.parametrize("changes", SPECS)
def test_transformers_reads_what_we_write(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = change(changes)
    (tmp_path / "config.json").write_text(to_text(write_config("hf", spec)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)

    assert_same_model(spec, config)
    if spec.rope_scaling is not None:
        assert dict(spec.rope_scaling.parameters).items() <= config.rope_parameters.items()
    for name, value in spec.extra.items():
        assert getattr(config, name) == value
    if spec.architecture == "llama":
        assert config.attention_bias == spec.qkv_bias == spec.o_bias
        assert config.mlp_bias == spec.mlp_bias
    if spec.dtype is not None:
        assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("changes", SPECS)
def test_what_transformers_saves_reads_back_to_the_same_model(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = change(changes)
    (tmp_path / "config.json").write_text(to_text(write_config("hf", spec)))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = read_spec(tmp_path / "saved")
    assert saved.model_copy(update={"extra": {}}) == spec.model_copy(update={"extra": {}})


def test_the_fields_that_transformers_4_looks_at_are_there() -> None:
    scaled = change({"rope_scaling": RopeScaling(kind="llama3", parameters=LLAMA3)})
    fields = write_config("hf", scaled)
    assert fields["rope_theta"] == 490_000.0
    assert fields["rope_scaling"] == LLAMA3 | {"rope_type": "llama3"}
    assert fields["torch_dtype"] == "bfloat16"
    assert fields["bos_token_id"] == 3
    assert fields["pad_token_id"] is None
    assert write_config("hf", PLAIN)["rope_scaling"] is None


def test_the_text_does_not_depend_on_the_order_of_what_is_carried_over() -> None:
    one = change({"extra": {"a": 1, "b": [2]}})
    other = change({"extra": {"b": [2], "a": 1}})
    text = to_text(write_config("hf", one))
    assert text == to_text(write_config("hf", other))
    assert text.endswith('"b": [\n    2\n  ]\n}\n')


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        pytest.param("hf-llama", {"architecture": "mistral"}, [], id="mistral-without-window"),
        pytest.param("hf-llama", {"sliding_window": 16}, ["sliding_window"], id="window"),
        pytest.param("hf-llama", {"architecture": "mistral", "sliding_window": 16}, [],
                     id="mistral-keeps-its-window"),
        pytest.param("hf-llama", {"sliding_window": 64}, [], id="window-that-does-not-bite"),
        pytest.param("hf-llama", {"qkv_bias": True}, ["qkv_bias"], id="only-qkv"),
        pytest.param("hf-llama", {"o_bias": True}, ["o_bias"], id="only-o"),
        pytest.param("hf-llama", {"n_heads": 14, "head_dim": 8}, ["n_heads"], id="odd-heads"),
        pytest.param("hf-mistral", {"mlp_bias": True, "qk_norm": True}, ["mlp_bias", "qk_norm"],
                     id="two-at-once"),
        pytest.param("hf", {"architecture": "novel"}, ["architecture"], id="unknown-class"),
        pytest.param("some-keymap", {"qk_norm": True}, [], id="family-without-a-file"),
    ],
)  # fmt: skip
def test_refusals(family: str, changes: dict[str, Any], names: list[str]) -> None:
    assert [refusal.name for refusal in refusals(family, change(changes))] == names


@pytest.mark.parametrize(
    ("family", "architecture", "written"),
    [
        ("hf", "llama", "llama"),
        ("hf", "mistral", "mistral"),
        ("hf-llama", "mistral", "mistral"),
        ("hf-mistral", "llama", "mistral"),
        ("hf-llama", "novel", "llama"),
    ],
)
def test_the_class_that_is_written(family: str, architecture: str, written: str) -> None:
    fields = write_config(family, change({"architecture": architecture}))
    assert fields["model_type"] == written


def test_writing_for_a_class_we_do_not_know_lists_those_we_do() -> None:
    with pytest.raises(NotExpressibleError) as raised:
        write_config("hf", change({"architecture": "novel"}))
    known = [name for name, kind in MODEL_TYPES.items() if kind.expresses is not None]
    assert raised.value.facts == tuple(("known", name) for name in known)


ERNIE = {"model_type": "ernie4_5_moe", "num_key_value_heads": 2} | SIZES | {"num_hidden_layers": 5}


def test_wherever_ernie_puts_experts_is_written_back() -> None:
    path = Path("config.json")
    for start, end, step in itertools.product(range(7), range(-1, 7), range(1, 7)):
        stated = {
            "moe_layer_start_index": start,
            "moe_layer_end_index": end,
            "moe_layer_interval": step,
        }
        spec = hf.read(ERNIE | stated, path)
        assert refusals("hf", spec) == ()
        again = hf.read(write_config("hf", spec), path)
        assert again.experts == spec.experts, stated


@pytest.mark.parametrize("dense", [(2,), (0, 2, 3), (1, 3)])
def test_other_places_of_experts_are_refused(dense: tuple[int, ...]) -> None:
    spec = hf.read(ERNIE, Path("config.json"))
    assert spec.experts is not None
    experts = spec.experts.model_copy(update={"dense_layers": dense})
    found = refusals("hf", spec.model_copy(update={"experts": experts}))
    assert [refusal.name for refusal in found] == ["experts"]
    assert "experts at a stride" in found[0].reason


def test_every_bad_field_is_named_at_once(tmp_path: Path) -> None:
    fields = {"model_type": "llama"} | SIZES | {"hidden_size": "big", "tie_word_embeddings": 1}
    fields |= {"eos_token_id": "x"}
    del fields["vocab_size"]
    with pytest.raises(SpecError) as raised:
        read_spec(save(tmp_path, fields))
    assert str(raised.value).splitlines() == [
        "parameter file has 4 fields that cannot be used",
        f"  file      {tmp_path / 'config.json'}",
        "  field     vocab_size: expected a value, found nothing",
        "  field     hidden_size: expected a valid integer, found 'big'",
        "  field     tie_word_embeddings: expected a valid boolean, found 1",
        "  field     eos_token_id: expected a valid integer or a valid list, found 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "headline"),
    [
        pytest.param("", "parameter file is not JSON", id="empty"),
        pytest.param("{", "parameter file is not JSON", id="truncated"),
        pytest.param("[" * 200_000, "parameter file is not JSON", id="nested-too-deeply"),
        pytest.param("[]", "parameter file is not a JSON object", id="list"),
        pytest.param("{}", "parameter file is of no known family", id="no-fields"),
        pytest.param('{"a": 1}', "parameter file is of no known family", id="something-else"),
        pytest.param(
            json.dumps({"model_type": "llama"} | SIZES | {"num_attention_heads": 7}),
            "head_dim is not stated and does not follow",
            id="head_dim-does-not-follow",
        ),
        pytest.param(
            json.dumps({"model_type": "llama"} | SIZES | {"num_key_value_heads": 4}),
            "parameter file has 1 field that cannot be used",
            id="heads-do-not-divide",
        ),
        pytest.param(
            json.dumps({"model_type": "llama"} | SIZES | {"num_hidden_layers": 10**12}),
            "parameter file has 1 field that cannot be used",
            id="absurd-layers",
        ),
        pytest.param(
            json.dumps({"model_type": 3} | SIZES),
            "parameter file has 3 fields that cannot be used",
            id="type-of-no-type",
        ),
        pytest.param(
            json.dumps({"architectures": [1]} | SIZES),
            "parameter file has 4 fields that cannot be used",
            id="architecture-of-no-name",
        ),
    ],
)
def test_a_bad_file_is_one_error(tmp_path: Path, text: str, headline: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError) as raised:
        read_spec(tmp_path)
    assert raised.value.headline == headline


JUNK: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    10**400,
    "x",
    [],
    ["x"],
    [[]],
    {},
    {"x": {}},
)


@pytest.mark.parametrize("written", ["hf", "lingua"])
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:12])
def test_junk_in_any_place_is_read_or_is_our_error(written: str, junk: object) -> None:
    scaled = change({"rope_scaling": RopeScaling(kind="llama3", parameters=LLAMA3)})
    fields: dict[str, Any] = write_config(written, scaled)
    read = hf.read if written == "hf" else lingua.read
    for holder in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name, value in list(holder.items()):
            holder[name] = junk
            try:
                read(fields, Path("any.json"))
            except SpecError as error:
                assert ("file", Path("any.json")) in error.facts  # noqa: PT017  reading may succeed
            holder[name] = value


def test_a_directory_without_a_file_is_an_error(tmp_path: Path) -> None:
    assert find_config(tmp_path) is None
    assert find_config(tmp_path / "absent") is None
    with pytest.raises(SpecError, match="no parameter file"):
        read_spec(tmp_path)


def test_the_file_is_found_from_any_side(tmp_path: Path) -> None:
    save(tmp_path, {}, "params.json")
    assert find_config(tmp_path / "consolidated.pth") == tmp_path / "params.json"
    save(tmp_path, {})
    (tmp_path / "model.safetensors").touch()
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "config.json"):
        assert find_config(path) == tmp_path / "config.json"
