"""A model without its naming: every tensor under its slot, its elements in one order of axes.

What the same weights are in every form and naming, so that they can be compared and fingerprinted.
docs/fingerprints.md is the definition; a test holds the page and ``LAYOUTS`` together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.errors import LayoutError
from dcpconv.core.layout import Axis, Fused, Layout, Node, Summed
from dcpconv.families.keymaps import Keymap, Pattern, Row, split_key
from dcpconv.plan.account import Aim, Differing
from dcpconv.plan.coverage import Target, as_stored
from dcpconv.sources.recognition import Weights
from dcpconv.sources.understanding import Source

_BY_LAYOUT: Mapping[str, str] = {
    "V d": "embed head",
    "V": "head_bias",
    "(h two p) d": "layer.q",
    "(g two p) d": "layer.k",
    "(g e) d": "layer.v",
    "d (h e)": "layer.o",
    "(h two p)": "layer.q_bias layer.q_norm_whole",
    "(g two p)": "layer.k_bias layer.k_norm_whole",
    "(g e)": "layer.v_bias",
    "(two p)": "layer.q_norm layer.k_norm",
    "h (p two)": "layer.q_norm_heads",
    "g (p two)": "layer.k_norm_heads",
    "f d": "layer.gate layer.up",
    "d f": "layer.down",
    "f": "layer.gate_bias layer.up_bias",
    "d": "final_norm layer.attn_norm layer.ffn_norm layer.post_attn_norm layer.post_ffn_norm"
    " layer.o_bias layer.down_bias layer.shared.down_bias layer.latent.o_bias",
    "E d": "layer.router",
    "E": "layer.router_bias",
    "m d": "layer.expert.gate layer.expert.up double.expert.gate double.expert.up",
    "d m": "layer.expert.down double.expert.down",
    "m u": "layer.inner.expert.up",
    "u m": "layer.inner.expert.down",
    "(S s) d": "layer.shared.gate layer.shared.up",
    "d (S s)": "layer.shared.down",
    "(S s)": "layer.shared.gate_bias layer.shared.up_bias",
    "a d": "layer.latent.q_a",
    "a": "layer.latent.q_a_bias layer.latent.q_a_norm",
    "c d": "layer.latent.kv_a",
    "c": "layer.latent.kv_a_bias layer.latent.kv_a_norm",
    "(p two) d": "layer.latent.k_rope",
    "(p two)": "layer.latent.k_rope_bias",
    "(h n) a": "layer.latent.q_b_nope",
    "(h p two) a": "layer.latent.q_b_rope",
    "(h n) d": "layer.latent.q_nope",
    "(h p two) d": "layer.latent.q_rope",
    "(h n) c": "layer.latent.k_b",
    "(h v) c": "layer.latent.v_b",
    "d (h v)": "layer.latent.o",
    "(lk lr lv) d": "layer.linear.v layer.linear.z",
    "vd vi vy vx": "vision.frame",
    "vd vi vt vy vx": "vision.patch",
    "(vh vr vp) vd": "vision.head_q vision.head_k",
    "(vh vr vp)": "vision.head_q_bias vision.head_k_bias",
}

LAYOUTS: Mapping[str, str] = MappingProxyType(
    {slot: layout for layout, slots in _BY_LAYOUT.items() for slot in slots.split()}
)
"""Slot -> its axes in the canonical order, which is how most files have it.

Never changed: a fingerprint would change with it.  Slots may be added; one that is absent has the
axes in the order of the table that names it.
"""

_INDICES = ("L", "E", "B", "D", "X")
"""Axes that may stand in a name: layers, experts, layers of a tower, double layers, all experts."""

_INDEX_AFTER = {"layer": "L", "double": "D", "expert": "EX"}
"""Component of a slot -> the indices of which one follows it."""

COMPUTED = frozenset({"inv_freq", "freqs", "freqs_cis", "mask"})
"""Last component of keys that a naming ignores because their values follow from the config."""

IDLE_AS_ZEROS = frozenset({"layer.router_bias"})
"""Slots that do nothing if all their elements are zero, and that some namings store even then."""

STORED = "stored/"
"""What stands before the key of a tensor that has no slot."""


@dataclass(frozen=True, slots=True)
class Canonical:
    """The tensors of a model, each once.

    Attributes:
        targets: Under their canonical names, in the order of the source.
        family: Naming of the source, or empty where keys are as stored.
        missing: Canonical names of what the naming asks for and the source lacks.
        left_out: ``(key, reason)`` of what is computed.
        notes: What else a user should know.
    """

    targets: tuple[Target, ...]
    family: str = ""
    missing: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_stored(self) -> bool:
        """Whether names are the source's own keys."""
        return not self.family


def canonical(
    source: Source, *, as_it_is_stored: bool = False, differing: Differing | None = None
) -> Canonical:
    """The tensors of a source without its naming.  Ties that are stored twice are compared.

    Args:
        source: As it was understood.
        as_it_is_stored: Keep the keys although a table knows them.
        differing: Tells which ties hold different values; by default both tensors are read.

    Raises:
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        LayoutError: Elements change places, and neither config nor shapes say where to.
    """
    weights = source.weights
    if weights.keymap is None or as_it_is_stored:
        targets = tuple(as_stored(key, entry) for key, entry in weights.entries.items())
        return Canonical(targets)
    table = weights.require_keymap()
    going = Aim(source, weights, source.spec, _table(table))
    notes: tuple[str, ...] = ()
    try:
        coverage = going.cover()
        unequal = going.unequal_ties(coverage, differing)
        if unequal and going.spec is not None:
            going = replace(going, spec=going.spec.model_copy(update={"tied": False}))
            coverage = going.cover()
    except LayoutError as error:
        hint = "--assets DIR names the model's config; --spec heads=N,kv_heads=M says it"
        raise LayoutError(error.headline, error.facts, hint=hint) from None
    made = [t for t in coverage.targets if t.values is None and t.tied_to is None]
    used = {piece.entry.key for target in made for piece in target.pieces}
    seconds = {key for key, _ in coverage.tied} - {key for key, _ in unequal}
    for key, owner in unequal:
        notes = (*notes, f"{key} and {owner} differ, so they are two tensors")
    left_out, rest = [], []
    for key, entry in weights.entries.items():
        if entry.key in used or key in seconds:
            continue
        if _is_computed(table, key):
            left_out.append((key, "computed from the config"))
        else:
            rest.append(as_stored(STORED + key, entry))
    if rest:
        some = ", ".join(target.key.removeprefix(STORED) for target in rest[:3])
        more = ", ..." if len(rest) > 3 else ""
        keys = "1 key has no slot and goes by its name"
        if len(rest) > 1:
            keys = f"{len(rest):,} keys have no slot and go by their names"
        notes = (*notes, f"{keys}: {some}{more}")
    missing = tuple(dict.fromkeys(fault.key for fault in coverage.missing))
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        notes = (*notes, f"{table.name} asks for {missing[0]}{more}, which the source lacks")
    targets = tuple(_in_order(weights, (*made, *rest)))
    return Canonical(targets, table.name, missing, tuple(left_out), notes)


def name_of(slot: str, indices: Sequence[str]) -> str:
    """The canonical name of a slot, with indices of a key in their places.

    >>> name_of("layer.expert.gate", ("L", "E")), name_of("embed", ())
    ('layer.{L}.expert.{E}.gate', 'embed')
    """
    parts: list[str] = []
    left = list(indices)
    for part in slot.split("."):
        parts.append(part)
        for index in _INDEX_AFTER.get(part, ""):
            if index in left:
                left.remove(index)
                parts.append(f"{{{index}}}")
    return ".".join((*parts, *(f"{{{index}}}" for index in left)))


def layer_of(target: Target) -> int | None:
    """The layer of a canonical tensor, or of a key as it is stored, whose first number it is;
    ``None`` beside the layers."""
    if target.slots:
        is_inside = target.slots[0].startswith(("layer.", "double."))
        return target.indices[0] if is_inside and target.indices else None
    return next(iter(split_key(target.key)[1]), None)


def slot_of(target: Target) -> str:
    """The slot of a canonical tensor, or a key as it is stored with ``N`` for its numbers."""
    return target.slots[0] if target.slots else split_key(target.key)[0].replace("{}", "N")


def layout_of(slot: str, row: Row, term: int) -> tuple[tuple[str, ...], Layout]:
    """Indices of a slot's name and the layout of its canonical tensor.

    Args:
        slot: The slot.
        row: A row that holds it.
        term: Its place among the row's alternatives.
    """
    known = LAYOUTS.get(slot)
    if known is None:
        return row.pattern.names, Layout(" ".join(map(_text, row.layout.nodes, [term] * 9)))
    layout = Layout(known)
    indices = tuple(axis for axis in _INDICES if axis in row.axes(term) - {*layout.axes()})
    return indices, layout


def _table(table: Keymap) -> Keymap:
    """The table of the canonical names of what a naming can hold."""
    rows: dict[tuple[str, str], Row] = {}
    for row in table.rows:
        for term, slot in enumerate(row.slots):
            indices, layout = layout_of(slot, row, term)
            name = name_of(slot, indices)
            rows.setdefault((name, row.when), Row(Pattern(name), (slot,), layout, row.when))
    return Keymap(
        name="canonical",
        title="canonical",
        family="canonical",
        config="",
        architectures=table.architectures,
        root="",
        rows=tuple(rows.values()),
        ties=(),
        ignored=(),
        source="docs/fingerprints.md",
        file=Path("canonical"),
    )


def _text(node: Node, term: int) -> str:
    """A node of a layout with one of its alternatives in place of the brackets."""
    if isinstance(node, Axis):
        return node.name
    inner = node.alternatives[term] if isinstance(node, Summed) else node
    assert isinstance(inner, Fused)  # noqa: S101
    text = " ".join(_text(child, term) for child in inner.nodes)
    return f"({text})" if len(inner.nodes) > 1 else text


def _is_computed(table: Keymap, key: str) -> bool:
    match = table.match(key)
    is_ignored = match is not None and match.kind == "ignored"
    return is_ignored and key.rpartition(".")[2] in COMPUTED


def _in_order(weights: Weights, targets: Sequence[Target]) -> Iterator[Target]:
    """Targets in the order of their first source tensor, so that a disk is read forwards."""
    place = {entry.key: n for n, entry in enumerate(weights.entries.values())}
    yield from sorted(targets, key=lambda target: place[_first(target).key])


def _first(target: Target) -> TensorEntry:
    return target.pieces[0].entry
