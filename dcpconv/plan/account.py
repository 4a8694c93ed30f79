"""The account of a source in a wanted naming: what it becomes, what is refused, what stays behind.

Every verb asks here; none decides for itself which naming a target has, which second names it
leaves out, or what it cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Form, Shapes, TensorEntry
from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.errors import AmbiguousFamilyError, FormatError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.block_scales import FACTORS, with_products
from dcpconv.plan.coverage import Coverage, Fault, Target, cover_as_stored
from dcpconv.plan.left_out import without_idle
from dcpconv.plan.matching import cover
from dcpconv.plan.refusals import refused_features, require_expressible, without
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.said import STORED
from dcpconv.sources.understanding import Source

Differing = Callable[[Weights, Sequence[tuple[str, str]]], list[tuple[str, str]]]
"""Those of the pairs ``(key, owner)`` that hold different values; keys are bare."""


@dataclass(frozen=True, slots=True)
class Aim:
    """Where a source is to go, and what it loses on the way; no key is matched yet.

    Attributes:
        source: As it was understood.
        weights: Its weights, with what stays behind marked.
        spec: The model's numbers without what stays behind.
        table: The naming to reach; ``None`` keeps every key as it is stored.
        form: Form of the result, where one is written.
        refused: Features that the naming cannot express, those that the user lets go included.
        root: What stands before every key where it is wanted: ``model.``, or empty.
    """

    source: Source
    weights: Weights
    spec: ModelSpec | None
    table: Keymap | None
    form: Form | None = None
    refused: tuple[Fault, ...] = ()
    root: str = ""

    @property
    def renames(self) -> bool:
        """Whether the naming changes."""
        return self.table is not None and self.table is not self.weights.keymap

    @property
    def omits_ties(self) -> bool:
        """Whether second names stay out that the target's files do not carry."""
        if self.table is None:
            return False
        return self.form == "hf" if self.form is not None else self.table.family == "hf"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What only a parameter file tells, where the naming is changed or such a file written."""
        return self.weights.doubts if self.renames or self.form == "hf" else ()

    @property
    def allowed(self) -> tuple[tuple[str, str], ...]:
        """What the target leaves out because the user said so, and why."""
        allow = self.source.said.allow
        return tuple((fault.key, fault.why) for fault in self.refused if fault.key in allow)

    @property
    def lost(self) -> tuple[Fault, ...]:
        """What is refused and the user did not let go."""
        return without(self.refused, self.source.said.allow)

    def require_expressible(self, *, undone: str, allow_by: str | None) -> None:
        """Raises unless the user lets go of everything that is refused.

        Raises:
            NotExpressibleError: All reasons are listed.
        """
        if self.table is not None:
            require_expressible(
                self.table,
                self.refused,
                self.source.said.allow,
                source=self.source.end.path or self.source.catalog.source,
                undone=undone,
                allow_by=allow_by,
            )

    def cover(self, *, product: DType | None = None) -> Coverage:
        """The account of every key on both sides; see ``stored`` where the naming is kept.

        Args:
            product: Element type of what is multiplied out of scaled blocks, where the user asks
                for that.

        Raises:
            LayoutError: A layout needs a size that neither file nor shapes reveal.
        """
        return self._cover(self.spec, product)

    def stored(self, *, product: DType | None = None, whole: bool = False) -> Coverage:
        """The account of keys that stay as they are stored.

        Args:
            product: As for ``cover``.
            whole: Everything in the source, under its containers, and not its weights alone.
        """
        weights, catalog = self.weights, self.source.catalog
        if whole:
            weights = replace(weights, entries=catalog.tensors, tied=catalog.tied, rest=())
        coverage = cover_as_stored(weights)
        return coverage if product is None else with_products(coverage, self.source, product)

    def cover_by_data(self, *, product: DType | None = None) -> tuple[Coverage, tuple[str, ...]]:
        """The same, and what to say about it, where bytes may be read: names of one tensor that
        hold different values are two tensors.

        Raises:
            FormatError: They do, and the source's naming has no place for the second.
        """
        coverage = self.cover(product=product)
        if self.table is None:
            return coverage, ()
        if not coverage or not (unequal := self.unequal_ties(coverage)):
            return coverage, ()
        key, owner = unequal[0]
        if self.spec is None or self.weights.require_keymap().rows_like(key) == []:
            raise FormatError(
                "two names of one tensor hold different values",
                [("source", self.source.catalog.source), ("key", key), ("owner", owner)],
                hint="load and save the model once, so that it is clear which one counts",
            )
        note = f"{key} and {owner} differ, so they are converted as two tensors"
        return self._cover(self.spec.model_copy(update={"tied": False}), product), (note,)

    def unequal_ties(
        self, coverage: Coverage, differing: Differing | None = None
    ) -> list[tuple[str, str]]:
        """Those of the tied ``(key, owner)`` that are stored twice and hold different values.

        Args:
            coverage: The account.
            differing: Tells which of some pairs differ; by default both tensors are read.
        """
        pairs = [pair for pair in coverage.tied if self._is_stored_twice(*pair)]
        if not pairs:
            return []
        if differing is None:
            from dcpconv.plan import ties  # noqa: PLC0415 - few store a tensor twice

            differing = ties.differing
        return differing(self.weights, pairs)

    def _cover(self, spec: ModelSpec | None, product: DType | None) -> Coverage:
        if self.table is None:
            return self.stored(product=product)
        coverage = cover(
            self.weights,
            self.table,
            spec=spec,
            omit_ties=self.omits_ties,
            refused=self.lost,
        )
        if product is not None:
            coverage = with_products(coverage, self.source, product)
        if self.renames or not (coverage.unknown or coverage.missing or coverage.misshapen):
            return coverage
        from dcpconv.plan.kept import covered_by_own  # noqa: PLC0415 - few lack or add anything

        parameters, is_dequantized = self.source.parameters, self.source.said.dequantize
        is_packed = parameters is not None and bool(parameters.quantized_by)
        return covered_by_own(
            coverage, self.weights, parameters, is_packed=is_packed and not is_dequantized
        )

    def _is_stored_twice(self, key: str, owner: str) -> bool:
        tied, entries = self.weights.tied, self.weights.entries
        return owner in entries and tied.get(key, key) != tied.get(owner, owner)


def aim(
    source: Source,
    *,
    to: str | None = None,
    form: Form | None = None,
    wanted: Shapes | None = None,
) -> Aim:
    """Decides what a source is to become.

    Args:
        source: As it was understood.
        to: The naming that the user asks for; ``stored`` keeps every key.
        form: Form of the result, where one is written.
        wanted: The tensors of a live model, whose keys decide where the user does not.

    Raises:
        KeymapError: No such family, or none of its tables is for this architecture.
        AmbiguousFamilyError: The namings on either side are not known, or leave a choice that
            changes the bytes.
        SpecError: Another naming needs the parameter file, which cannot be read.
    """
    model = _as_catalog(wanted) if wanted is not None else None
    table = _table(source, to, form, model)
    if table is not None and table is not source.keymap:
        source.weights.require_keymap()
    parameters = source.parameters
    is_renamed = table is not None and table is not source.keymap
    if is_renamed and source.spec is None and parameters is not None and parameters.trouble:
        configs.read_spec(parameters.file)  # raises: another naming needs what the file says
    return aim_at(source, table, form=form, model=model, wanted=wanted)


def aim_at(
    source: Source,
    table: Keymap | None,
    *,
    form: Form | None = None,
    model: Catalog | None = None,
    wanted: Shapes | None = None,
) -> Aim:
    """The same where the naming is decided."""
    weights, spec = without_idle(source.weights, source.spec, table, allow=source.said.allow)
    if table is None:
        return Aim(source, _as_wanted(weights, wanted), spec, None, form)
    is_same = table is weights.keymap
    if is_same:
        weights = replace(weights, alternatives=())  # whichever it is, no name changes
    if spec is not None and spec.head == "none" and spec.tied and table.holders("head"):
        spec = spec.model_copy(update={"head": "lm"})  # the embedding is the head
    refused: tuple[Fault, ...] = ()
    if spec is not None and not is_same:
        refused = refused_features(table, spec, weights.keymap)
    root = recognise(model, keymap=table).root if model is not None else ""
    return Aim(source, weights, spec, table, form, refused, root)


def _table(
    source: Source, to: str | None, form: Form | None, model: Catalog | None
) -> Keymap | None:
    """The naming to reach, or ``None`` to keep keys as they are stored."""
    own, keymap = source.said.keymap, source.keymap
    if to == STORED:
        return None
    if to is not None:
        if keymap is None:
            source.weights.require_keymap()  # raises, and says what works instead
        return source.target_table(to)
    if own is not None and keymap is not None and keymap is not own:
        return own
    if own is not None and keymap is own and source.said.from_ is None:
        return None  # the table was found; nobody asked for other names
    if form == "hf" and keymap is not None:
        return keymap if keymap.family == "hf" else source.target_table("hf")
    return _table_of(model, source) if model is not None else None


def _as_catalog(wanted: Shapes) -> Catalog:
    """A model as a checkpoint without bytes, so that its naming is found like any other."""
    dtype = BY_NAME["float32"]  # no table looks at it
    entries = {key: TensorEntry(key, dtype, shape, ()) for key, shape in wanted.items()}
    return Catalog("torch", Path(), Path("model"), {}, entries)


def _table_of(model: Catalog, source: Source) -> Keymap | None:
    """The naming of a model; ``None`` where names alone must do.

    A source whose own table knows every key of the model is taken to spell the model's naming.
    """
    own = source.keymap
    if own is None:
        return None
    same = recognise(model, keymap=own)
    if same.entries and not same.rest and all(map(own.match, same.entries)):
        return own
    found = recognise(model, spec=source.spec)
    whole = recognise(model, may_have_more=True)
    if whole.keymap is not None:
        # What has every key of a naming is of it, whatever model the source is of.
        others = (whole.keymap, *whole.same, *whole.alternatives)
        if found.keymap not in others:
            found = whole
    if found.keymap is None:
        return None
    if found.alternatives:
        raise AmbiguousFamilyError(
            "several namings fit the keys of the model, and they lead to different bytes",
            [("fits", table.name) for table in (found.keymap, *found.alternatives)],
            hint="choose one with to=NAME",
        )
    return found.keymap


def _as_wanted(weights: Weights, wanted: Shapes | None) -> Weights:
    """The weights under those keys of a checkpoint that a model spells likewise: with or without
    the container they were saved in, whatever that is called."""
    if wanted is None:
        return weights
    catalog, stored = weights.catalog, weights.catalog.tensors
    found = sum(key in weights.entries for key in wanted)
    if sum(key in stored for key in wanted) <= found:
        roots = _roots_of_all(wanted, stored) if not found else []
        return recognise(catalog, root=roots[0]) if len(roots) == 1 else weights
    return replace(weights, entries=stored, tied=catalog.tied, root="", rest=())


def _roots_of_all(wanted: Shapes, stored: Mapping[str, TensorEntry]) -> list[str]:
    """Everything before the keys of a checkpoint under which it has every key of a model."""
    one = next(iter(wanted), "")
    ends = (key for key in stored if one and key.endswith(f".{one}"))
    roots = (key[: len(key) - len(one)] for key in ends)
    return [root for root in roots if all(root + key in stored for key in wanted)]


def factors_of(source: Catalog, target: Target) -> tuple[str, ...]:
    """Stored keys of the factors without which the elements of a target mean nothing: those of its
    one-byte sources that are not multiplied in."""
    if target.dtype.itemsize > 1:
        return ()
    bare = (piece.entry.key for piece in target.pieces if piece.entry.factors is None)
    names = dict.fromkeys(key + suffix for key in bare for suffix in FACTORS)
    return tuple(name for name in names if name in source.tensors)
