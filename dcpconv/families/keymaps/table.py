"""What a naming table says: rows, ties, ignored keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

from dcpconv.core.layout import Layout
from dcpconv.core.spec import Declared

_INDEX = re.compile(r"\{([A-Z])\}")
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")
"""A component of a key that is a number; ten digits are no index."""

HEADS = frozenset({"head", "head_bias", "score", "score_bias", "spans", "spans_bias"})
"""Slots behind the last layer, which are not part of a base model."""

_WITH_BASES = frozenset({"hf", "hf-memory"})
"""Families whose models hold a base model under one name, which is not in its own files.

Source: ``base_model_prefix`` in ``modeling_utils.py`` of transformers 5.23.0."""

Indices = Mapping[str, int]
"""Values of the indices in a key: ``{"L": 3, "E": 0}``."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A key with named indices: ``layers.{L}.attention.wq.weight``.

    Attributes:
        text: As the table spells it.
        names: Indices in the order they occur.
        template: The key with every number replaced by ``{}``: what a lookup compares.
        fixed: ``(position, number)`` of numbers that the table spells out.
    """

    text: str
    names: tuple[str, ...] = field(init=False)
    template: str = field(init=False)
    fixed: tuple[tuple[int, int], ...] = field(init=False)
    _positions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        names, fixed, positions, parts = [], [], [], []
        count = 0
        for part in self.text.split("."):
            found = _INDEX.fullmatch(part)
            if found:
                names.append(found.group(1))
                positions.append(count)
            elif part.isdigit():
                fixed.append((count, int(part)))
            else:
                parts.append(part)
                continue
            parts.append("{}")
            count += 1
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "fixed", tuple(fixed))
        object.__setattr__(self, "template", ".".join(parts))
        object.__setattr__(self, "_positions", tuple(positions))

    def key(self, indices: Indices) -> str:
        """The key for some index values; a missing index is a ``KeyError``."""
        return self.text.format_map(indices) if self.names else self.text

    def indices(self, numbers: tuple[int, ...]) -> dict[str, int] | None:
        """Index values from the numbers of a key with the same template, or ``None`` if a number
        that the table spells out differs."""
        if any(numbers[at] != number for at, number in self.fixed):
            return None
        return {name: numbers[at] for name, at in zip(self.names, self._positions, strict=True)}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a key, the slots it holds, how they are stored, and when it exists.

    Attributes:
        pattern: The key.
        slots: One slot, or several in the order of the layout's alternatives.
        layout: Axes of the stored tensor.
        when: ``tied``, ``untied``, a feature of the model (``qk_norm``), several of them joined by
            ``&``, or ``""`` for always.
    """

    pattern: Pattern
    slots: tuple[str, ...]
    layout: Layout
    when: str = ""

    @property
    def conditions(self) -> frozenset[str]:
        """What ``when`` asks for, all of which a model must have."""
        return frozenset(word.strip() for word in self.when.split("&") if word.strip())

    def same_storage(self, other: Row) -> bool:
        """Whether both rows store the same slots in the same way, so that bytes can be copied
        without knowing any size."""
        return (
            self.slots == other.slots
            and self.layout.text == other.layout.text
            and set(self.pattern.names) == set(other.pattern.names)
        )

    def axes(self, term: int) -> frozenset[str]:
        """What tells elements of a slot apart: indices of the key, axes of the layout."""
        return frozenset((*self.pattern.names, *self.layout.axes(term)))

    def canonical_axes(self, term: int) -> frozenset[str]:
        """The same, where query heads are counted over all groups however they are stored."""
        axes = self.axes(term)
        return (axes - {"g", "r"}) | {"h"} if "r" in axes else axes


@dataclass(frozen=True, slots=True)
class Tie:
    """A second name for a tensor; ``omitted`` where Hugging Face files leave it out."""

    key: str
    owner: str
    omitted: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """A part of a model that is kept as it is stored: a vision tower, layers that predict ahead.

    Attributes:
        prefix: What its keys begin with.
        role: What it is; it goes to the prefix that another family has for the same role.
    """

    prefix: str
    role: str


RuleKind = Literal["row", "tied", "ignored", "aside", "kept"]


@dataclass(frozen=True, slots=True)
class Match:
    """What a table says about one key.

    Attributes:
        row: The row, or for a tied key the row of its owner; ``None`` for an ignored key and one
            that is kept.
        indices: Index values read from the key.
        kind: Whether the key is a tensor of its own, a second name, dropped, kept aside, or of a
            part that is kept.
        reason: Why it is ignored or kept aside, or what it is a part of.
    """

    row: Row | None
    indices: dict[str, int]
    kind: RuleKind = "row"
    reason: str = ""


@dataclass(frozen=True)
class Keymap:
    """The table of one naming.

    Attributes:
        name: ``hf-llama``, ``lingua``: what ``--to`` and ``--from`` take.
        title: One line for ``dcpconv families``.
        family: What users call the group: ``hf`` for every ``hf-*``.
        config: Which module of ``configs`` reads and writes its parameter file, or ``""``.
        architectures: ``ModelSpec.architecture`` values that use this table, first the default.
        root: Key that the weights sit under in a training checkpoint, ``""`` for none.
        rows: The table.
        ties: Second names.
        ignored: ``(pattern, reason)`` of keys that are dropped.
        aside: ``(pattern, reason)`` of keys that no other family has a place for and that are worth
            keeping: a conversion writes them to a file of their own, and finds them there again.
        source: Where the facts come from.
        file: The table's file, for errors.
        also: Further groups that the table serves: what a live model calls its tensors is what the
            files call them, unless a table of ``hf-memory`` says otherwise.
        like: The table whose rows it took over; empty for none.
        always: Slots without which a checkpoint is of another family, besides the rows without a
            condition.
        derived: Key -> what it is computed from where the source has no such tensor.
        beyond: Index -> why keys whose index exceeds the config are dropped; kind of layer -> why
            its rows are dropped where a layer is of another.
        idle: Index -> index; nothing looks at tensors from as many on as there are of the second,
            so that files may lack them.
        same_sizes: Axis -> axis of the same size that layouts name in its place.
        by_name: Whether keys that another table has too are taken for that one's, unless a
            parameter file or the user names this one: its class is the less common.
        hints: What tells the family from others with the same keys: ``vocab_size``, ``q_per_kv``
            (query heads per kv head), or a field of ``ModelSpec``.
        facts: Fields of ``ModelSpec`` that no file of the family states.
        published: Sizes of the published models, by ``ModelSpec`` field and ``name``.
        declared: Axes and kinds of layers of its own.
        kept: Parts that are kept as they are stored.
        is_headless: Whether it is for base models saved alone: nothing stands before their keys,
            and nothing behind the last layer.
        variants: Tables that ``bases`` has made of it.
    """

    name: str
    title: str
    family: str
    config: str
    architectures: tuple[str, ...]
    root: str
    rows: tuple[Row, ...]
    ties: tuple[Tie, ...]
    ignored: tuple[tuple[Pattern, str], ...]
    source: str
    file: Path
    aside: tuple[tuple[Pattern, str], ...] = ()
    also: tuple[str, ...] = ()
    like: str = ""
    always: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    beyond: Mapping[str, str] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    same_sizes: Mapping[str, str] = field(default_factory=dict)
    by_name: bool = False
    hints: Mapping[str, int | bool] = field(default_factory=dict)
    facts: Mapping[str, int | float | bool] = field(default_factory=dict)
    published: tuple[Mapping[str, int | str], ...] = ()
    declared: Declared = field(default_factory=Declared)
    kept: tuple[Kept, ...] = ()
    is_headless: bool = False
    _by_template: dict[str, list[tuple[Pattern, Row | None, RuleKind, str]]] = field(
        init=False, repr=False, compare=False
    )
    _by_slot: dict[str, list[tuple[Row, int]]] = field(init=False, repr=False, compare=False)
    variants: dict[tuple[str, bool], Keymap] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        templates: dict[str, list[tuple[Pattern, Row | None, RuleKind, str]]] = {}
        slots: dict[str, list[tuple[Row, int]]] = {}
        for row in self.rows:
            templates.setdefault(row.pattern.template, []).append((row.pattern, row, "row", ""))
            for term, slot in enumerate(row.slots):
                slots.setdefault(slot, []).append((row, term))
        owners = {row.pattern.text: row for row in self.rows}
        for tie in self.ties:
            # A key can be a tensor of its own when untied: its row answers then, and the tie only
            # says which tensor it repeats.
            if tie.key not in owners:
                pattern = Pattern(tie.key)
                templates.setdefault(pattern.template, []).append(
                    (pattern, owners[tie.owner], "tied", "")
                )
        for pattern, reason in self.ignored:
            templates.setdefault(pattern.template, []).append((pattern, None, "ignored", reason))
        for pattern, reason in self.aside:
            templates.setdefault(pattern.template, []).append((pattern, None, "aside", reason))
        object.__setattr__(self, "_by_template", templates)
        object.__setattr__(self, "_by_slot", slots)

    def match(self, key: str) -> Match | None:
        """What the table says about a key, or ``None`` if it does not know it."""
        template, numbers = split_key(key)
        for pattern, row, kind, reason in self._by_template.get(template, ()):
            indices = pattern.indices(numbers)
            if indices is not None:
                return Match(row, indices, kind, reason)
        part = self.part_of(key)
        return None if part is None else Match(None, {}, "kept", part.role)

    def part_of(self, key: str) -> Kept | None:
        """The part that is kept as it is stored and that a key is of."""
        return next((part for part in self.kept if key.startswith(part.prefix)), None)

    def place_of(self, key: str, role: str) -> str | None:
        """What this family calls a key, without its prefix, of a part with this role."""
        return next((part.prefix + key for part in self.kept if part.role == role), None)

    def knows(self, template: str) -> bool:
        """Whether some key with this template is in the table."""
        return template in self._by_template or self.part_of(template) is not None

    @property
    def templates(self) -> frozenset[str]:
        """Templates of all keys in the table."""
        return frozenset(self._by_template)

    def rows_like(self, template: str) -> list[Row | None]:
        """What keys with this template may be; ``None`` for an ignored one."""
        return [row for _, row, _, _ in self._by_template.get(template, ())]

    def holders(self, slot: str) -> list[tuple[Row, int]]:
        """Rows that hold a slot, each with the slot's place among the row's alternatives."""
        return self._by_slot.get(slot, [])

    def with_axes(self, names: Mapping[str, str]) -> Keymap:
        """The same table with some axes of its layouts renamed."""
        if not names:
            return self
        pattern = re.compile(rf"\b({'|'.join(names)})\b")
        rows = tuple(
            replace(row, layout=Layout(pattern.sub(lambda m: names[m[0]], row.layout.text)))
            for row in self.rows
        )
        return replace(self, rows=rows)

    @property
    def base(self) -> str:
        """What stands before the keys of the base model: ``model.``; empty where nothing does."""
        if self.family not in _WITH_BASES or not self.holders("embed"):
            return ""
        first = self.holders("embed")[0][0].pattern.text.partition(".")[0] + "."
        inside = (row for row in self.rows if not HEADS & set(row.slots))
        return first if all(row.pattern.text.startswith(first) for row in inside) else ""

    @property
    def slots(self) -> frozenset[str]:
        """Every slot the family can hold."""
        return frozenset(self._by_slot)

    @property
    def parameter_family(self) -> str:
        """What ``configs`` knows the family by: every class of transformers by its own name."""
        return self.name if self.family == "hf" else self.config

    def keeps_aside(self, key: str) -> bool:
        """Whether a key has its place here and in no family that lacks the part it is of."""
        match = self.match(key)
        is_aside = match is not None and match.kind == "aside"
        return is_aside or self.part_of(key) is not None

    @property
    def aside_module(self) -> str:
        """The module that all such tensors are in: ``transformer.prefix_encoder``."""
        keys = [*(pattern.text for pattern, _ in self.aside), *(p.prefix for p in self.kept)]
        paths = [key.split(".") for key in keys]
        return ".".join(takewhile(str, map(_shared, zip(*paths, strict=False))))

    @property
    def aside_file(self) -> str:
        """Where a conversion keeps such tensors: ``prefix_encoder.safetensors``."""
        name = self.aside_module.rpartition(".")[2]
        return f"{'aside' if name in {'', 'model'} else name}.safetensors"

    def tie_pairs(self) -> dict[str, str]:
        """``second name -> owner``: the table's own, and the head beside the embedding."""
        pairs = {tie.key: tie.owner for tie in self.ties}
        embeddings = [row.pattern.text for row, _ in self.holders("embed")]
        for row, _ in self.holders("head"):
            if "untied" in row.conditions and embeddings:
                pairs.setdefault(row.pattern.text, embeddings[0])
        return pairs


def _shared(parts: tuple[str, ...]) -> str:
    """The component that all have in one place, or nothing."""
    return parts[0] if len(set(parts)) == 1 else ""


def split_key(key: str) -> tuple[str, tuple[int, ...]]:
    """A key with its numbers taken out.

    >>> split_key("layers.3.attention.wq.weight")
    ('layers.{}.attention.wq.weight', (3,))
    """
    numbers = _NUMBER.findall(key)
    if not numbers:
        return key, ()
    return _NUMBER.sub("{}", key), tuple(map(int, numbers))
