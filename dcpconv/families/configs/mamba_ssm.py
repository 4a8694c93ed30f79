"""The config.json of state-spaces/mamba, for models whose layers are all Mamba 2.

Source: state-spaces/mamba@e9594ce: ``MambaConfig`` in ``models/config_mamba.py``, ``create_block``
and ``MambaLMHeadModel`` in ``models/mixer_seq_simple.py``, ``Mamba2`` in ``modules/mamba2.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from dcpconv.core.record import Json, Record, field
from dcpconv.core.spec import Count, ModelSpec, Size
from dcpconv.families.configs import hf
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.parameters import Refusal, Wishes, checked

_EPS = 1e-5
"""Of every norm; no file states it."""

_LONGEST = float.fromhex("0x1.fffffep127")

_STATE: Mapping[str, str] = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "chunk_size": "chunk_size",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
}
"""Field of ``ssm_cfg`` -> what transformers calls it."""

_DEFAULTS: Mapping[str, object] = {
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "bias": False,
    "conv_bias": True,
    "chunk_size": 256,
    "dt_limit": [0.0, math.inf],
}

_PLAIN: Mapping[str, tuple[object, ...]] = {
    "d_ssm": (None,),
    "D_has_hdim": (False,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
}
"""Fields of ``ssm_cfg`` that add tensors or compute otherwise -> values with which they do not."""

_INITIAL = ("layer", "conv_init", "A_init_range", "use_mem_eff_path", "sequence_parallel")
"""What it is, how values are drawn and which kernels run."""


class _Config(Record, extra="allow"):
    d_model: Size
    n_layer: Count
    vocab_size: Size = 50_277
    d_intermediate: int = 0
    ssm_cfg: Mapping[str, Json] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: Mapping[str, Json] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: Size = 8
    tie_embeddings: bool = True


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that the file describes, in the words of transformers' Mamba 2.

    A model with tensors that this has no place for is named for what it has: such names are in no
    table, so its keys stay as they are stored.

    Raises:
        SpecError: Facts list every field that does not fit.
    """
    config = checked(_Config, fields, file)
    state = {**_DEFAULTS, **config.ssm_cfg}
    multiple = config.pad_vocab_size_multiple
    expand, width = state["expand"], state["headdim"]
    inner = expand * config.d_model if isinstance(expand, int) else 0
    described: dict[str, object] = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": multiple * -(-config.vocab_size // multiple),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "num_heads": inner // width if isinstance(width, int) and width > 0 else None,
        **{theirs: state[own] for own, theirs in _STATE.items() if own in state},
        "hidden_act": "silu",
        "layer_norm_epsilon": _EPS,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    spec = hf.read(described, file)
    strange = (
        *unaccounted(config.model_extra or {}),
        *unaccounted(
            {f"ssm_cfg.{name}": value for name, value in config.ssm_cfg.items()},
            harmless=[f"ssm_cfg.{name}" for name in (*_STATE, *_PLAIN, *_INITIAL)],
        ),
    )
    if state.get("norm_before_gate"):
        strange = (*strange, "ssm_cfg.norm_before_gate: true")
    return spec.model_copy(
        update={
            "architecture": _name(config),
            "origin": "mamba_ssm",
            "unaccounted": (*spec.unaccounted, *strange),
        }
    )


def _name(config: _Config) -> str:
    layer = config.ssm_cfg.get("layer", "Mamba1")
    if layer != "Mamba2":
        return "mamba" if layer == "Mamba1" else str(layer).lower()
    more = list(_more(config))
    return f"mamba2 with {' and '.join(more)}" if more else "mamba2"


def _more(config: _Config) -> Iterator[str]:
    """Fields by which a model has other tensors than every Mamba 2 of transformers."""
    if config.attn_layer_idx:
        yield "attn_layer_idx"
    if config.d_intermediate:
        yield "d_intermediate"
    if not config.rms_norm:
        yield "rms_norm off"
    for name, plain in _PLAIN.items():
        if name != "norm_before_gate" and config.ssm_cfg.get(name, plain[0]) not in plain:
            yield f"ssm_cfg.{name}"


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What the package cannot hold of ``spec``."""
    del family
    name = "mamba_ssm"
    if spec.architecture != "mamba2":
        return (Refusal("architecture", f"{spec.architecture}: {name} is another model"),)
    found = []
    if spec.norm_eps != _EPS:
        found.append(Refusal("norm_eps", f"{spec.norm_eps}: {name} adds {_EPS} in every norm"))
    if spec.activation != "silu":
        found.append(Refusal("activation", f"{spec.activation}: {name} has silu"))
    if spec.head != "lm":
        found.append(Refusal("no_head", f"{spec.head}: {name} gives logits"))
    return tuple(found)


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """config.json for ``spec``: every field of ``MambaConfig`` and no other, since it takes none.

    Tokens that pad the embedding are counted as tokens.
    """
    del family, wishes
    stated = spec.stated
    state: dict[str, object] = {
        own: stated[theirs] for own, theirs in _STATE.items() if theirs in stated
    }
    limit = state.pop("dt_limit", None)
    bounds = [_bound(one) for one in limit] if isinstance(limit, list | tuple) else []
    if bounds and bounds != [0.0, math.inf]:
        state["dt_limit"] = [_written(bound) for bound in bounds]
    return {
        "d_model": spec.hidden_size,
        "d_intermediate": 0,
        "n_layer": spec.n_layers,
        "vocab_size": spec.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **state},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": bool(stated.get("residual_in_fp32", True)),
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": spec.tied,
    }


def _bound(value: Json) -> object:
    """A number, which transformers 5 writes as a mapping where JSON has none for it."""
    return float(str(value["__float__"])) if isinstance(value, Mapping) else value


def _written(value: object) -> object:
    """The same as JSON has it: no step is longer than the largest number in fp32."""
    return _LONGEST if value == math.inf else value
