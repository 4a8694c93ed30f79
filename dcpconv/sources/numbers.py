"""Sizes that no config states: solved from shapes, said by the user, or those of published models.

Nothing here guesses in silence: what shapes leave open comes from a person or from a table, and a
note says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs.model_types import MODEL_TYPES
from dcpconv.families.configs.patching import built_spec
from dcpconv.families.keymaps import Keymap, Row
from dcpconv.families.sizes import solve
from dcpconv.sources.recognition import Weights


def inferred_spec(
    weights: Weights, pairs: Mapping[str, str] | None = None
) -> tuple[ModelSpec | None, tuple[str, ...]]:
    """A spec for weights without a config, and notes on what it rests on.

    Sizes come from the shapes; what the family fixes comes from its table; head counts come from
    ``pairs`` or, where hidden size and layers are those of a published model, from the table.

    Args:
        weights: Their naming known.
        pairs: From ``parse_pairs``.

    Returns:
        ``None`` where too little is known: no one said how many heads there are.

    Raises:
        SpecError: A value does not fit its field, or contradicts the shapes.
    """
    pairs = dict(pairs or {})
    table = weights.keymap
    if table is None or weights.alternatives:
        return None, ()
    shapes, counts, routed = _shapes(weights, table)
    fields, width = _stored(shapes, counts)
    if table.is_headless:
        fields["head"] = "none"
    notes: list[str] = []
    if "hidden_size" not in fields or not fields.get("n_layers"):
        return None, ()
    heads = _head_counts(fields, table, pairs, notes)
    if heads is None:
        return None, ()
    fields |= heads
    rows_q = width.get("layer.q", 0)
    channels = rows_q or _columns(shapes, "layer.o")
    if not channels:
        return None, ()
    fields.setdefault("head_dim", max(1, channels // int(fields["n_heads"])))
    facts = dict(table.facts)
    per_token, norm_top1 = facts.pop("per_token", None), facts.pop("norm_top1", True)
    unsaid = [name for name in ("norm_eps", "rope_theta") if _is_open(name, weights, pairs)]
    if "experts" in fields:
        _complete_experts(fields["experts"], per_token, pairs, notes)
        dense = tuple(n for n in range(int(fields["n_layers"])) if n not in routed)
        fields["experts"]["dense_layers"] = dense
        fields["experts"]["norm_topk"] = bool(norm_top1) or fields["experts"]["per_token"] > 1
        unsaid += ["per_token"] if _is_open("per_token", weights, pairs) else []
    stated = [name for name in ("norm_eps", "rope_theta", "max_seq_len") if name in facts]
    said = ", ".join(f"{n} {facts[n]:g}" for n in stated if n not in pairs and n not in unsaid)
    if said:
        notes.append(f"{said}: what {table.title} has, since no file says so")
    facts.setdefault("max_seq_len", 2048)
    facts.setdefault("tied", shares_head(weights))
    fields = {**facts, **fields, "architecture": _architecture(table, fields)}
    fields |= {"origin": table.config}
    unsaid += [name for name in _fixed_by_class(fields, table) if name not in pairs]
    fields["unsaid"] = tuple(unsaid)
    for name, rows, count in (("layer.q", rows_q, "n_heads"), ("layer.k", 0, "n_kv_heads")):
        stored = rows or width.get(name, 0)
        counted = int(fields[count]) * int(fields["head_dim"])
        if stored and stored != counted:
            raise SpecError(
                f"{count} contradicts the shapes",
                [
                    (count, fields[count]),
                    ("head_dim", fields["head_dim"]),
                    ("expected", f"{counted} rows of {name}, found {stored}"),
                ],
            )
    return built_spec(fields, pairs), tuple(notes)


_NUMBERS = {
    "partial_rotary": "partial_rotary_factor",
    "attn_softcap": "attn_logit_softcap",
    "final_softcap": "final_logit_softcap",
    "query_multiplier": "query_multiplier",
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
}
"""Features that are a number which changes the logits and shows in no shape, and its field."""


def _fixed_by_class(fields: dict[str, Any], table: Keymap) -> list[str]:
    """Fills in what the code of a class of transformers fixes; names numbers that it leaves open.

    Without its config.json, these are all that is known of the model beside its shapes.
    """
    known = MODEL_TYPES.get(fields["architecture"])
    if known is None or not table.config.startswith("hf-"):
        return []
    fields |= known.implied
    if "experts" in fields:
        fields["experts"] |= known.experts
    open_ = [field for name, field in _NUMBERS.items() if name in (known.expresses or ())]
    if known.defaults.get("sliding_window") and "use_sliding_window" not in known.defaults:
        open_.append("layer_types")
    says_norm = {"norm_topk", "norm_topk_prob"} & {*known.experts, *known.defaults}
    if "experts" in fields and not says_norm:
        open_.append("experts.norm_topk")
    return open_


def _is_open(name: str, weights: Weights, pairs: Mapping[str, str]) -> bool:
    """Whether a number is what no file and no one says: tables that fit alike disagree on it, or
    the table says nothing."""
    if name in pairs or f"experts.{name}" in pairs or weights.keymap is None:
        return False
    rivals = () if weights.is_hinted else weights.same
    values = {table.facts.get(name) for table in (weights.keymap, *rivals)}
    return len(values) > 1 or None in values


def require_said(spec: ModelSpec, weights: Weights) -> None:
    """Raises where a parameter file would hold numbers that are only defaults of ours.

    Raises:
        SpecError: Lists them, and what the families that fit would say.
    """
    if weights.keymap is None:
        return
    known = MODEL_TYPES.get(spec.architecture)
    if known is not None and known.is_copied and not spec.stated:
        raise SpecError(
            "the result's config.json has fields that neither shapes nor numbers say; nothing was"
            " written",
            [
                ("source", weights.catalog.source),
                ("lacks", f"the config.json of a {known.class_name}"),
            ],
            hint="--assets DIR names a directory with it",
        )
    if not spec.unsaid:
        return
    facts: list[tuple[str, object]] = [("source", weights.catalog.source)]
    facts += [("lacks", name) for name in spec.unsaid]
    has_choice = False
    for table in (weights.keymap, *weights.same):
        told = [f"{n} {table.facts[n]:g}" for n in spec.unsaid if n in table.facts]
        if told:
            has_choice = True
            facts.append(("fits", f"{table.name}: {', '.join(told)}"))
    words = {
        "norm_eps": "eps=1e-5",
        "rope_theta": "theta=10000",
        "per_token": "top_k=2",
        "experts.norm_topk": "experts.norm_topk=true",
    }
    example = ",".join(words.get(name, f"{name}=1.0") for name in spec.unsaid)
    choice = ", --from NAME takes a family's" if has_choice else ""
    raise SpecError(
        "no file says what the result's parameter file has to; nothing was written",
        facts,
        hint=f"--spec {example} states it{choice}, --assets DIR names a config",
    )


def shares_head(weights: Weights) -> bool:
    """Whether head and embedding are one tensor, as far as keys and storage tell."""
    entries, shared, table = weights.entries, weights.tied, weights.keymap
    if table is None:
        return False
    rows = {row.pattern.text for row in table.rows}
    return any(
        shared.get(second, second) == shared.get(owner, owner)
        if second in entries and owner in entries and second in rows
        else owner in entries
        for second, owner in table.tie_pairs().items()
    )


def _shapes(
    weights: Weights, table: Keymap
) -> tuple[dict[Row, tuple[int, ...]], dict[str, int], set[int]]:
    """A shape for every row that is there, how far every index counts, and layers with a router."""
    shapes: dict[Row, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    routed: set[int] = set()
    for key, entry in weights.entries.items():
        match = table.match(key)
        if match is not None and match.row is not None and match.kind == "row":
            shapes.setdefault(match.row, entry.shape)
            for name, value in match.indices.items():
                counts[name] = max(counts.get(name, 0), value + 1)
            if "layer.router" in match.row.slots:
                routed.add(match.indices.get("L", 0))
    return shapes, counts, routed


def _stored(
    shapes: Mapping[Row, tuple[int, ...]], counts: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Fields that shapes reveal, and the rows of every slot stored by itself."""
    sizes: dict[str, int] = {"two": 2}
    for row, shape in shapes.items():
        solve(row, shape, sizes)
    width = {row.slots[0]: shape[0] for row, shape in shapes.items() if len(row.slots) == 1}
    fields: dict[str, Any] = {
        name: sizes[axis]
        for name, axis in (("hidden_size", "d"), ("vocab_size", "V"), ("ffn_size", "f"))
        if axis in sizes
    }
    if "L" in counts:
        fields["n_layers"] = counts["L"]
    if "p" in sizes and "layer.q_norm" in width:
        fields["head_dim"] = 2 * sizes["p"]
    slots = {slot for row in shapes for slot in row.slots}
    fields["qk_norm"] = "layer.q_norm" in slots
    fields["qkv_bias"] = "layer.q_bias" in slots
    fields["o_bias"] = "layer.o_bias" in slots
    fields["mlp_bias"] = bool({"layer.down_bias", "layer.shared.down_bias"} & slots)
    fields["head_bias"] = "head_bias" in slots
    heads = ("spans", "score_bias", "score")
    fields["head"] = next((head for head in heads if head in slots), "lm")
    if "k" in sizes:
        fields["n_classes"] = sizes["k"]
    if "layer.router" in slots and "m" in sizes:
        fields["experts"] = {
            "count": width["layer.router"],
            "ffn_size": sizes["m"],
        }
        fields.setdefault("ffn_size", sizes["m"])
        if "layer.shared.gate" in slots:
            fields["experts"] |= {
                "shared_count": counts.get("S", 1),
                "shared_ffn_size": width.get("layer.shared.gate", sizes["m"]),
            }
    return fields, width


def _columns(shapes: Mapping[Row, tuple[int, ...]], slot: str) -> int:
    return next((shape[1] for row, shape in shapes.items() if row.slots == (slot,)), 0)


def _head_counts(
    fields: Mapping[str, Any], table: Keymap, pairs: dict[str, str], notes: list[str]
) -> dict[str, int] | None:
    if "n_heads" in pairs:
        heads = _whole(pairs, "n_heads")
        return {"n_heads": heads, "n_kv_heads": _whole(pairs, "n_kv_heads", heads)}
    for published in table.published:
        if all(published[name] == fields[name] for name in ("hidden_size", "n_layers")):
            heads, groups = int(published["n_heads"]), int(published["n_kv_heads"])
            notes.append(
                f"{heads} heads and {groups} kv heads: those of {published['name']}, which has "
                f"these sizes; --spec heads=N,kv_heads=M states others"
            )
            return {"n_heads": heads, "n_kv_heads": groups}
    return None


def _complete_experts(
    experts: dict[str, Any],
    per_token: float | None,
    pairs: Mapping[str, str],
    notes: list[str],
) -> None:
    said = pairs.get("experts.per_token")
    top = int(said) if said and said.isdigit() else int(per_token or 1)
    experts["per_token"] = min(top, experts["count"])
    if said is None:
        notes.append(f"{top} experts per token: the usual number; --spec top_k=N states another")


def _architecture(table: Keymap, fields: Mapping[str, Any]) -> str:
    """The class for dense models or, last in the table's list, for models with experts."""
    return table.architectures[-1 if "experts" in fields else 0] if table.architectures else "llama"


def _whole(pairs: Mapping[str, str], name: str, otherwise: int = 0) -> int:
    text = pairs.get(name)
    if text is None:
        return otherwise
    if not text.isdigit() or int(text) == 0:
        raise SpecError("not a count", [(name, text)])
    return int(text)
