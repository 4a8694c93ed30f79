"""What a checkpoint can supply under the keys of some naming: a conversion nobody writes down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import AmbiguousFamilyError, NotExpressibleError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs.patching import parse_pairs
from dcpconv.families.keymaps import Keymap, read_keymap
from dcpconv.formats.opening import open_checkpoint
from dcpconv.plan.block_scales import FACTORS, SCALE
from dcpconv.plan.coverage import Coverage, Target, cover_as_stored
from dcpconv.plan.in_memory import cover_in_memory, spells_like_files
from dcpconv.plan.left_out import without_idle
from dcpconv.plan.matching import cover
from dcpconv.plan.refusals import refused_features, require_expressible
from dcpconv.sources.live_models import LiveModel
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.settling import find_spec, settle, target_keymap

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor of a model, by key."""

_PRODUCT = BY_NAME["float32"]
"""What elements and factors are multiplied in: whoever wants another type rounds once, from it."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a source is to be understood.

    Attributes:
        to: Naming to supply, or ``None`` to decide from the keys that are wanted.
        from_: Naming of the source, where its keys leave a choice.
        keymap: File with a table of the user's own.
        assets: Directory with the config, where the source has none.
        spec: Numbers of the model that no file states, as ``heads=8,kv_heads=2``.
        allow: Features to leave out although the naming cannot express them.
        dequantize: Whether weights in scaled blocks are multiplied out.
    """

    to: str | None = None
    from_: str | None = None
    keymap: Path | None = None
    assets: Path | None = None
    spec: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    dequantize: bool = False

    @property
    def names_no_table(self) -> bool:
        """Whether nothing here needs a table of names."""
        return self.to is None and self.keymap is None and not self.dequantize

    @property
    def advice(self) -> str:
        """What to do about factors that have no place in a model."""
        if not self.dequantize:
            return "dequantize=True multiplies fp8 weights by the factors of their blocks"
        return f"only matrices with X{SCALE} can be multiplied out; get them in another type"


@dataclass(frozen=True, slots=True)
class Supply:
    """A source under the keys of some naming.

    Attributes:
        catalog: The source.
        weights: Its weights and their naming.
        coverage: Every target with the source bytes it is made of, and all that does not fit.
        root: What stands before every key where it is wanted: ``model.``, or empty.
        notes: What a user should know, one sentence each.
    """

    catalog: Catalog
    weights: Weights
    coverage: Coverage
    root: str = ""
    notes: tuple[str, ...] = ()

    def targets(self) -> dict[str, Target]:
        """Every tensor that can be supplied, by the key it is wanted under."""
        return {self.root + target.key: target for target in self.coverage.targets}

    def factors_of(self, target: Target) -> tuple[str, ...]:
        """Stored keys of the factors without which the elements of a target mean nothing: those of
        its one-byte sources that are not multiplied in."""
        if target.dtype.itemsize > 1:
            return ()
        bare = (piece.entry.key for piece in target.pieces if piece.scale is None)
        names = dict.fromkeys(key + suffix for key in bare for suffix in FACTORS)
        return tuple(name for name in names if name in self.catalog.tensors)


def prepare(
    source: Path,
    options: Options,
    *,
    wanted: Shapes | None = None,
    live: LiveModel | None = None,
) -> Supply:
    """Opens a source and accounts for its keys.

    Args:
        source: A checkpoint of any form.
        options: How to understand it.
        wanted: The tensors of a model; decides the naming where ``options.to`` does not.
        live: Where the model is one of transformers, what it says of its names.

    Raises:
        AmbiguousFamilyError: The namings on either side are not known, or leave a choice that
            changes the bytes.
        NotExpressibleError: The naming cannot hold this model; all reasons are listed.
        FormatError: A file is truncated, malformed or unsafe.
    """
    catalog = open_checkpoint(source)
    own = read_keymap(options.keymap) if options.keymap else None
    config, notes = find_spec(catalog, options.assets)
    sizes = parse_pairs(options.spec)
    weights, spec, settled = settle(catalog, config, from_=options.from_, own=own, sizes=sizes)
    notes = (*notes, *settled)
    if not options.names_no_table or wanted is None:
        live = None
    if live is not None and wanted is not None and spells_like_files(weights, config, live):
        coverage = cover_in_memory(weights, live, wanted)
        _require_conversion(coverage, source)
        return Supply(catalog, weights, coverage, "", (*catalog.notes, *notes))
    model = _model_weights(wanted) if wanted is not None else None
    target = target_keymap(options.to, own, weights.keymap, spec) if options.to else None
    if target is None and own is not None and own is not weights.keymap:
        target = own
    if target is None and model is not None:
        target = _table_of(model, weights, spec)
    if target is None and options.dequantize:
        target = weights.require_keymap()
    weights, spec = without_idle(weights, spec, target, allow=options.allow)
    root = ""
    if target is None:
        weights = _as_wanted(weights, wanted)
        coverage = cover_as_stored(weights)
    else:
        is_renamed = target is not weights.keymap
        features = refused_features(target, spec) if spec and is_renamed else ()
        require_expressible(
            target,
            features,
            options.allow,
            source=source,
            undone="nothing was loaded",
            allow_by="allow=[NAME]",
        )
        notes = (*notes, *(f"{f.key} is left out ({f.why})" for f in features))
        coverage = cover(
            weights, target, spec=spec, dequantize=_PRODUCT if options.dequantize else None
        )
        if model is not None:
            root = _root_of(model, target)
    return Supply(catalog, weights, coverage, root, (*catalog.notes, *notes))


def _require_conversion(coverage: Coverage, source: Path) -> None:
    if coverage.refused:
        raise NotExpressibleError(
            f"the weights of {coverage.target} are made of its files in a way that cannot be"
            " planned; nothing was loaded",
            [
                ("source", source),
                *(("refused", f"{fault.key}: {fault.why}") for fault in coverage.refused),
            ],
            hint="from_pretrained can load them, on one device",
        )


def _model_weights(wanted: Shapes) -> Catalog:
    """The model as a checkpoint without bytes, so that its naming is found like any other."""
    dtype = BY_NAME["float32"]  # no table looks at it
    entries = {key: TensorEntry(key, dtype, shape, ()) for key, shape in wanted.items()}
    return Catalog("torch", Path(), Path("model"), {}, entries)


def _table_of(model: Catalog, weights: Weights, spec: ModelSpec | None) -> Keymap | None:
    """The naming of a model; ``None`` where names alone must do.

    A source whose own table knows every key of the model is taken to spell the model's naming.
    """
    if weights.keymap is not None:
        same = recognise(model, keymap=weights.keymap)
        if same.entries and not same.rest and all(map(weights.keymap.match, same.entries)):
            return weights.keymap
    found = recognise(model, spec=spec)
    if found.keymap is None or weights.keymap is None:
        return None
    if found.alternatives:
        raise AmbiguousFamilyError(
            "several namings fit the keys of the model, and they lead to different bytes",
            [("fits", table.name) for table in (found.keymap, *found.alternatives)],
            hint="choose one with to=NAME",
        )
    return found.keymap


def _root_of(model: Catalog, target: Keymap) -> str:
    return recognise(model, keymap=target).root


def _as_wanted(weights: Weights, wanted: Shapes | None) -> Weights:
    """The weights under those keys of a checkpoint that a model spells likewise: with or without
    the container they were saved in."""
    if wanted is None:
        return weights
    stored = weights.catalog.tensors
    if sum(key in stored for key in wanted) <= sum(key in weights.entries for key in wanted):
        return weights
    return Weights(weights.catalog, stored, weights.catalog.tied, weights.keymap, "", ())
