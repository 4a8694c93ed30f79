"""docs/families.md, made from the tables: who spells which slot how, and who can hold what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from dcpconv.core.spec import SPECIAL, Experts, LatentAttention, ModelSpec, RopeScaling
from dcpconv.families.configs import config_name, refusals
from dcpconv.families.configs.model_types import MODEL_TYPES
from dcpconv.families.keymaps import keymaps
from dcpconv.families.keymaps.words import AXES, CONDITIONS

_INTRO = """\
# Families

A family is a way to spell the tensors of a model: a table of keys, each with the *slots* it holds
and the *layout* it stores them in. `--to` and `--from` take the names below; `hf` and `hf-memory`
stand for the table of the model's own class. Two families convert into each other as far as they
share slots; what one cannot hold is refused by name, and `--allow NAME` leaves it out.

`dcpconv families NAME` prints one table. [keymaps.md](keymaps.md) says how to write your own.

<!-- Written by `make docs` from dcpconv/families/keymaps/tables/*.toml; a test compares. -->
"""

_EXPERTS = Experts(count=4, per_token=2, ffn_size=8, norm_topk=True)
_LATENT = LatentAttention(q_rank=4, kv_rank=4, nope_dim=4, value_dim=4)
_LATENT_BIASES: Mapping[str, Any] = {
    "latent": _LATENT.model_copy(update={"bias": True}),
    "o_bias": True,
}

_FEATURES: Mapping[str, Mapping[str, Any]] = {
    "qkv_bias": {"qkv_bias": True, "o_bias": True},
    "o_bias": {"o_bias": True, "qkv_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_bias": {"head_bias": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm_whole": {"qk_norm_whole": True},
    "qk_norm_heads": {"qk_norm_heads": True},
    "no_rope_layers": {"no_rope_layers": (1,)},
    "no_pre_norms": {"pre_norms": False},
    "post_norms": {"post_norms": True},
    "norm": {"norm": "rmsnorm_plus_one"},
    "norm_bias": {"norm": "layernorm", "norm_bias": True},
    "embed_norm": {"embed_norm": True},
    "bare_norms": {"bare_norms": True},
    "attention_gate": {"attention_gate": True},
    "positions": {"positions": "learned"},
    "parallel_residual": {"parallel_residual": True},
    "parallel_norms": {"parallel_residual": True, "parallel_norms": True},
    "ungated": {"gated": False},
    "activation": {"activation": "gelu"},
    "clamped_glu": {"glu_limit": 7.0, "glu_alpha": 1.702},
    "sinks": {"sinks": True},
    "rope_scaling": {
        "rope_scaling": RopeScaling(
            kind="llama3",
            parameters={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
    },
    "partial_rotary": {"partial_rotary_factor": 0.5},
    "sliding_window": {"sliding_window": 8},
    "layer_types": {"layer_types": ("full_attention", "sliding_attention")},
    "attn_softcap": {"attn_logit_softcap": 50.0},
    "final_softcap": {"final_logit_softcap": 30.0},
    "query_multiplier": {"query_multiplier": 0.5},
    "embedding_multiplier": {"embedding_multiplier": 2.0},
    "residual_multiplier": {"residual_multiplier": 0.5},
    "logits_scaling": {"logits_scaling": 2.0},
    "experts": {"experts": _EXPERTS},
    "expert_bias": {"experts": _EXPERTS.model_copy(update={"bias": True})},
    "latent_attention": {"latent": _LATENT},
    "latent_bias": _LATENT_BIASES,
    "score": {"head": "score", "n_classes": 3},
    "score_bias": {"head": "score_bias", "n_classes": 3},
    "spans": {"head": "spans"},
    "no_head": {"head": "none"},
    **{name: {"special": {name: "of one class"}} for name in sorted(SPECIAL)},
}
"""A model with each feature, to ask every family about."""

_TOGETHER: tuple[Mapping[str, Any], ...] = (
    dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "head_bias"), True),
    dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    {"parallel_residual": True, "parallel_norms": True},
    _LATENT_BIASES,
    {"rope_scaling": RopeScaling(kind="longrope")},
    {
        "rope_scaling": RopeScaling(
            kind="yarn", parameters={"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        )
    },
)
"""Models with several features that some family has only together, or of the one kind it has."""


def families_page() -> str:
    """The page as markdown."""
    parts = (_families(), _features(), _remainders(), _slots(), _words())
    return "\n".join([_INTRO, *chain.from_iterable(parts)]) + "\n"


def _families() -> Iterator[str]:
    yield "## The families\n"
    yield "| name | models | config | from |"
    yield "| --- | --- | --- | --- |"
    for table in keymaps().values():
        written = config_name(table.config)
        name = f"`{table.name}`" + "".join(f", `{group}`" for group in table.also)
        yield f"| {name} | {table.title} | {f'`{written}`' if written else ''} | {table.source} |"
    yield ""


def _features() -> Iterator[str]:
    yield "## What they can hold\n"
    yield "A model of a family may have the features on its line; any other is refused."
    yield "A feature in bold is one that every model of the family has.\n"
    yield "| family | features |"
    yield "| --- | --- |"
    groups: dict[str, list[str]] = {}
    for table in keymaps().values():
        if table.family == "hf-memory":
            continue
        groups.setdefault(_held(table.config), []).append(f"`{table.name}`")
        if table.family == "hf":
            for name in table.architectures[1:]:
                groups.setdefault(_held(f"hf-{name}"), []).append(f"`{table.name}` for {name}")
    for held, names in groups.items():
        yield f"| {', '.join(names)} | {held or 'none: a plain Llama'} |"
    yield ""


_NO_OTHER = "no other class becomes one of these"


def _held(family: str) -> str:
    known = MODEL_TYPES.get(family.removeprefix("hf-"))
    if any(item.name == "architecture" for item in refusals(family, _model())):
        others = ", ".join(f"`hf-{name}`" for name in known.takes) if known is not None else ""
        becomes = f"of other classes only {others} becomes one" if others else _NO_OTHER
        return f"what its own class has; {becomes}"
    found = []
    absent = {item.name for item in refusals(family, _model()) if item.kind == "absent"}
    own = {"experts"} if known is not None and known.routing is not None else set()
    for name, changes in _FEATURES.items():
        models = [
            spec for more in (changes, *_TOGETHER) if name in (spec := _model(**more)).features()
        ]
        if name in own or any(name not in _refused(family, spec) for spec in models):
            found.append(f"**{name}**" if name in absent else name)
    return ", ".join(found)


def _refused(family: str, spec: ModelSpec) -> set[str]:
    return {item.name for item in refusals(family, spec) if item.kind != "absent"}


def _model(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "head_dim": 8,
        "ffn_size": 16,
        "max_seq_len": 64,
        "tied": True,
    }
    return ModelSpec(**sizes | changes)


def _remainders() -> Iterator[str]:
    yield "## What has no place elsewhere\n"
    yield "Dropped, as no family needs it; kept in a file of its own beside the result, from where"
    yield "the way back takes it up again; or made by the conversion, where the source has none. A"
    yield "bias that is made of zeros is left out again while it is zeros, and of other values only"
    yield "with `--allow selection_bias`.\n"
    yield "| key | families | what becomes of it |"
    yield "| --- | --- | --- |"
    found: dict[tuple[str, str], list[str]] = {}
    for table in keymaps().values():
        fates = [
            *((pattern.text, f"dropped: {reason}") for pattern, reason in table.ignored),
            *((p.text, f"kept in `{table.aside_file}`: {why}") for p, why in table.aside),
            *((f"{p.prefix}*", f"kept as stored: {p.role}") for p in table.kept),
            *((key, f"made: {rule}") for key, rule in table.derived.items()),
        ]
        for fate in fates:
            found.setdefault(fate, []).append(f"`{table.name}`")
    for (key, becomes), names in found.items():
        yield f"| `{key}` | {', '.join(names)} | {becomes} |"
    yield ""


def _slots() -> Iterator[str]:
    yield "## Who stores what, and how\n"
    yield "Layouts name the axes of the stored tensor, outermost first. `(a b)` is one dimension,"
    yield "`[a | b]` lays several slots end to end, and an index of the key is not in the layout."
    yield ""
    layouts: dict[str, dict[str, list[str]]] = {}
    for table in keymaps().values():
        for row in table.rows:
            for slot in row.slots:
                whole = row.layout.text
                text = whole if row.layout.terms == 1 else f"{whole} of {' | '.join(row.slots)}"
                layouts.setdefault(slot, {}).setdefault(text, []).append(table.name)
    yield "| slot | layout | families |"
    yield "| --- | --- | --- |"
    for slot in sorted(layouts, key=lambda slot: (slot.count("."), slot)):
        for text, names in layouts[slot].items():
            shown = text.replace("|", "\\|")
            yield f"| `{slot}` | `{shown}` | {', '.join(names)} |"
    yield ""


def _words() -> Iterator[str]:
    yield "## Axes and conditions\n"
    yield "| axis | counts |"
    yield "| --- | --- |"
    for axis, meaning in AXES.items():
        yield f"| `{axis}` | {meaning} |"
    yield ""
    yield "A row whose condition joins several by `&` exists where all of them hold.\n"
    yield "| condition | the row exists |"
    yield "| --- | --- |"
    for condition, meaning in CONDITIONS.items():
        yield f"| `{condition}` | {meaning} |"
