"""Meta Lingua's params.json: the whole TrainArgs of a run, of which a model is one section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcpconv.core.dtypes import dtype_named
from dcpconv.core.errors import SpecError
from dcpconv.core.record import Record, field
from dcpconv.core.spec import Count, ModelSpec, Positive, Size
from dcpconv.families.configs.ffn import ffn_width, solve_ffn
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.parameters import Refusal, Wishes, checked

EXPRESSES: frozenset[str] = frozenset()
"""LMTransformer is a Llama without features: sizes, eps, theta and tying say all there is."""

MODEL_DTYPES = ("fp32", "fp16", "bf16")
"""Source: ``apps/main/generate.py`` at facebookresearch/lingua@437d680; any other is a KeyError."""

_WHY = {
    "rope_scaling": "Lingua computes plain RoPE from rope_theta",
    "partial_rotary": "Lingua turns whole heads",
    "sliding_window": "Lingua heeds its sliding_window only with attn_impl=fmha, not in training",
    "layer_types": "Lingua's layers are all alike",
    "qkv_bias": "wq, wk and wv have no bias in Lingua",
    "o_bias": "wo has no bias in Lingua",
    "mlp_bias": "w1, w2 and w3 have no bias in Lingua",
    "head_bias": "output has no bias in Lingua",
    "qk_norm": "Lingua does not normalise q and k",
    "norm": "Lingua has plain RMSNorm only",
    "no_head": "Lingua has one, which only a tied embedding could be",
    "score": "Lingua has logits only",
    "score_bias": "Lingua has logits only",
    "spans": "Lingua has logits only",
    "post_norms": "Lingua normalises before each block only",
    "activation": "Lingua's feed-forward is SiLU only",
    "attn_softcap": "Lingua does not cap attention scores",
    "final_softcap": "Lingua does not cap logits",
    "query_multiplier": "Lingua scales by head_dim ** -0.5",
    "experts": "Lingua has no experts",
    "latent_attention": "Lingua's attention is the usual kind",
    "latent_bias": "Lingua's attention is the usual kind",
    "qk_norm_whole": "Lingua does not normalise q and k",
    "no_pre_norms": "Lingua normalises before each block",
    "qk_norm_heads": "Lingua does not normalise q and k",
    "no_rope_layers": "Lingua turns q and k in every layer",
    "parallel_residual": "Lingua adds attention before feed-forward sees it",
    "ungated": "Lingua's feed-forward has a gate",
}
"""Source: ``lingua/transformer.py`` and ``apps/main/transformer.py``, same commit."""


_OF_A_RUN = (
    *("name", "dump_dir", "seed", "grad_acc_steps", "gc_collect_freq", "probe_freq", "steps"),
    *("data", "optim", "model", "distributed", "env", "checkpoint", "profiling", "logging"),
    *("async_eval_gpus", "eval", "dcpconv"),
)
"""Sections that say how a run goes; only ``model`` says what it computes, and ``dcpconv`` what an
earlier conversion left out.  Source: ``TrainArgs`` in ``apps/main/train.py``, same commit."""

_AT_THE_START = ("init_base_std", "init_std_factor", "seed")
"""Fields of the model that set its first values.  Source: ``LMTransformerArgs``, same commit."""


class _Section(Record, extra="ignore"):
    """A part of TrainArgs; what we do not look at may be anything."""


class _Distributed(_Section):
    model_dtype: str | None = None


class _Model(Record, extra="allow"):
    """LMTransformerArgs, with Lingua's defaults."""

    dim: Size = 512
    n_layers: Count = 8
    head_dim: int | None = field(default=None, ge=0)
    n_heads: int | None = field(default=None, ge=0, le=100_000)
    n_kv_heads: int | None = field(default=None, ge=0, le=100_000)
    ffn_dim_multiplier: Positive | None = None
    multiple_of: Size = 256
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 10_000.0
    max_seqlen: Size = 1024
    vocab_size: int = -1
    weight_tying: bool = False
    sliding_window: Size | None = None


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a Lingua params.json describes; what is left out takes Lingua's default.

    Raises:
        SpecError: Facts list every field that does not fit.
    """
    model = _section(fields, "model")
    args = checked(_Model, model, file)
    # As in TransformerBlock.__init__, where 0 counts as not given.
    if not (args.head_dim or args.n_heads):
        raise SpecError(
            "neither head_dim nor n_heads is given",
            [("file", file), ("field", "model.head_dim"), ("field", "model.n_heads")],
        )
    head_dim = args.head_dim or args.dim // (args.n_heads or 1)
    n_heads = args.n_heads or args.dim // head_dim
    windowed = args.sliding_window is not None
    return checked(
        ModelSpec,
        {
            "architecture": "mistral" if windowed else "llama",
            "vocab_size": args.vocab_size if args.vocab_size > 0 else None,
            "hidden_size": args.dim,
            "n_layers": args.n_layers,
            "n_heads": n_heads,
            "n_kv_heads": args.n_kv_heads or n_heads,
            "head_dim": head_dim,
            "ffn_size": ffn_width(args.dim, args.multiple_of, args.ffn_dim_multiplier),
            "norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "max_seq_len": args.max_seqlen,
            "tied": args.weight_tying,
            "dtype": checked(_Distributed, _section(fields, "distributed"), file).model_dtype,
            "sliding_window": args.sliding_window,
            "origin": "lingua",
            "unaccounted": (
                *(
                    f"model.{text}"
                    for text in unaccounted(args.model_extra or {}, harmless=_AT_THE_START)
                ),
                *unaccounted(fields, harmless=_OF_A_RUN),
            ),
        },
        file,
    )


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What Lingua's LMTransformer cannot hold of ``spec``."""
    del family
    found = [
        Refusal(name, f"{value}: {_WHY.get(name, 'Lingua has no such factor')}")
        for name, value in spec.features().items()
        if name not in EXPRESSES
    ]
    if spec.hidden_size % spec.n_heads:
        reason = f"Lingua asserts that they divide dim {spec.hidden_size}, whatever the head_dim"
        found.append(Refusal("n_heads", f"{spec.n_heads}: {reason}"))
    return tuple(found)


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """params.json for ``spec``: every field of TrainArgs, Lingua's default where nothing is known.

    It has no field beyond TrainArgs, so that it also serves as a training config, which Lingua
    reads strictly; whatever else there is to say belongs in a file beside it.

    Features that do not fit are left out, see ``refusals``.  ``model_dtype``, to which generate.py
    casts the weights, is bf16 where nobody says a dtype, as in Lingua.

    Raises:
        SpecError: Lingua does not know the dtype.
    """
    del family
    kind, path = wishes.tokenizer or ("bytes", None)
    width = solve_ffn(spec.hidden_size, spec.ffn_size)
    return {
        "name": wishes.name,
        "dump_dir": "",
        "seed": 42,
        "grad_acc_steps": 1,
        "gc_collect_freq": 1000,
        "probe_freq": None,
        "steps": 1000,
        "data": {
            "root_dir": None,
            "sources": {},
            "batch_size": 2,
            # train.py overwrites model.max_seqlen with it.
            "seq_len": min(2048, spec.max_seq_len),
            "n_views": 2,
            "seed": 42,
            "add_bos": True,
            "add_eos": True,
            "load_async": True,
            "prefetch_size": 64,
            "tokenizer": {"name": kind, "path": path},
        },
        "optim": {
            "lr": 3e-4,
            "weight_decay": 0.1,
            "epsilon": 1e-8,
            "beta1": 0.9,
            "beta2": 0.95,
            "clip": 1.0,
            "scheduler": "cosine",
            "warmup": 2000,
            "lr_min_ratio": 0.1,
            "cycle_length": 1.0,
            "cosine_theta": 1.0,
            "annealing_step": 1000,
            "decay_fraction": 0.1,
            "exp_factor": 0.5,
        },
        "model": {
            "dim": spec.hidden_size,
            "n_layers": spec.n_layers,
            "head_dim": spec.head_dim,
            "n_heads": spec.n_heads,
            "n_kv_heads": spec.n_kv_heads,
            "ffn_dim_multiplier": width.multiplier,
            "multiple_of": width.multiple_of,
            "norm_eps": spec.norm_eps,
            "rope_theta": spec.rope_theta,
            "init_base_std": None,
            "init_std_factor": "disabled",
            "max_seqlen": spec.max_seq_len,
            "seed": 42,
            "vocab_size": spec.vocab_size,
            "weight_tying": spec.tied,
            "sliding_window": spec.sliding_window,
        },
        "distributed": {
            "dp_shard": 1,
            "dp_replicate": 1,
            "tp_size": 1,
            "selective_activation_checkpointing": False,
            "compile": False,
            "fsdp_type": "no_shard",
            "model_dtype": _model_dtype(wishes.dtype or spec.dtype or "bf16"),
            "float8_recipe": None,
            "float8_filter": r"layers\.[0-9]+\.",
            "matmul_allow_tf32": False,
            "detect_anomaly": False,
            "compile_cache_size_limit": 8,
            "spawn_method": "forkserver",
        },
        "env": {
            "MKL_SERVICE_FORCE_INTEL": "GNU",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "ENABLE_INTRA_NODE_COMM": "1",
            "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
            "NCCL_IB_TIMEOUT": "22",
            "NCCL_DEBUG": "INFO",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        },
        "checkpoint": {
            "dump": {"every": 1000, "keep": 0},
            "eval": {"every": 1000, "keep": 0},
            "path": None,
            "init_ckpt_path": None,
            "continue_training_from_init": False,
        },
        "profiling": {
            "run": False,
            "trace_folder": "profiling",
            "mem_warmup": 100,
            "mem_steps": 2,
            "profile_warmup": 102,
            "profile_steps": 2,
        },
        "logging": {"freq": 10, "acc_freq": None, "wandb": None},
        "async_eval_gpus": None,
        "eval": None,
    }


def _section(fields: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = fields.get(name)
    return value if isinstance(value, dict) else {}


def _model_dtype(dtype: str) -> str:
    known = dtype_named(dtype)
    if known is None or known.label not in MODEL_DTYPES:
        raise SpecError(
            "Lingua has no such model_dtype",
            [("found", dtype), ("expected", " or ".join(MODEL_DTYPES))],
        )
    return known.label
