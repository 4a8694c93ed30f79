"""What a checkpoint can supply to a live model: an account whose bytes stay where they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Shapes
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import NotExpressibleError
from dcpconv.plan.account import aim, aim_at, factors_of
from dcpconv.plan.adapting import merged_into
from dcpconv.plan.block_scales import with_products
from dcpconv.plan.coverage import Coverage, Target
from dcpconv.plan.in_memory import cover_in_memory, spells_like_files
from dcpconv.plan.offering import trained_apart, widened
from dcpconv.sources.adapters.naming import Weighed, read_adapters
from dcpconv.sources.live_models import LiveModel
from dcpconv.sources.recognition import Weights
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import Source, understand

PRODUCT = BY_NAME["float32"]
"""What elements and factors are multiplied in: whoever wants another type rounds once, from it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller typed of a source and of the naming to supply, not parsed yet: files are
    opened where all ranks hear of a fault.

    Attributes:
        to: Naming to supply, or ``None`` to decide from the keys that are wanted.
        from_: Naming of the source, where its keys leave a choice.
        keymap: File with a table of the user's own.
        assets: Directory with the config, where the source has none.
        spec: Numbers of the model that no file states, as ``heads=8,kv_heads=2``.
        allow: Features to leave out although the naming cannot express them.
        dequantize: Whether weights in scaled blocks are multiplied out.
        adapters: What is merged into the source, ``DIR`` or ``DIR:WEIGHT`` each.
    """

    to: str | None = None
    from_: str | None = None
    keymap: str | os.PathLike[str] | None = None
    assets: str | os.PathLike[str] | None = None
    spec: Sequence[str] = ()
    allow: Sequence[str] = ()
    dequantize: bool = False
    adapters: tuple[str, ...] = ()

    @property
    def names_no_table(self) -> bool:
        """Whether nothing here needs a table of names."""
        return self.to is None and self.keymap is None

    @property
    def advice(self) -> str:
        """What to do about factors that have no place in a model."""
        if not self.dequantize:
            return "dequantize=True multiplies quantised weights by their factors"
        return "its factors are of no kind that can be multiplied in; get it in another type"

    def said(self) -> Said:
        """The same, parsed."""
        return Said.parse(
            from_=self.from_,
            keymap=self.keymap,
            assets=self.assets,
            spec=self.spec,
            allow=self.allow,
            dequantize=self.dequantize,
        )


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
        """Stored keys of the factors without which the elements of a target mean nothing."""
        return factors_of(self.catalog, target)


def prepare(
    source: Path,
    options: Options,
    *,
    wanted: Shapes | None = None,
    live: LiveModel | None = None,
    whole: bool = False,
) -> Supply:
    """Opens a source and accounts for its keys.

    Args:
        source: A checkpoint of any form.
        options: How to understand it.
        wanted: The tensors of a model; decides the naming where ``options.to`` does not.
        live: Where the model is one of transformers, what it says of its names.
        whole: Keep every key as it is stored, with its containers and what stands beside weights.

    Raises:
        AmbiguousFamilyError: The namings on either side are not known, or leave a choice that
            changes the bytes.
        NotExpressibleError: The naming cannot hold this model; all reasons are listed.
        FormatError: A file is truncated, malformed or unsafe.
    """
    return supply_of(
        understand(source, options.said(), shapes=wanted),
        options,
        adapters=read_adapters(options.adapters),
        wanted=wanted,
        live=live,
        whole=whole,
    )


def supply_of(
    understood: Source,
    options: Options,
    *,
    adapters: Sequence[Weighed] = (),
    wanted: Shapes | None = None,
    live: LiveModel | None = None,
    whole: bool = False,
) -> Supply:
    """The same for a source and adapters that have been opened."""
    if (
        live is not None
        and wanted is not None
        and options.names_no_table
        and spells_like_files(understood.weights, live)
    ):
        return _in_memory(understood, adapters, live, wanted)
    going = aim(understood, to=options.to, form="dcp", wanted=wanted)
    doubts = going.doubts
    going, merged = merged_into(going, adapters, undone="nothing was loaded")
    spec, apart = trained_apart(going.weights, going.spec)
    going = replace(going, spec=spec)
    going.require_expressible(undone="nothing was loaded", allow_by="allow=[NAME]")
    coverage = going.stored(product=PRODUCT, whole=True) if whole else going.cover(product=PRODUCT)
    left_out = (f"{key} is left out ({why})" for key, why in going.allowed)
    notes = (*going.source.notes, *doubts, *merged, *apart, *left_out)
    return Supply(going.source.catalog, going.weights, widened(coverage), going.root, notes)


def _in_memory(
    source: Source, adapters: Sequence[Weighed], live: LiveModel, wanted: Shapes
) -> Supply:
    """What a model of transformers makes of its own published files."""
    going, merged = merged_into(aim_at(source, None), adapters, undone="nothing was loaded")
    coverage = with_products(cover_in_memory(going.weights, live, wanted), going.source, PRODUCT)
    if coverage.refused:
        raise NotExpressibleError(
            f"the weights of {coverage.target} are made of its files in a way that cannot be"
            " planned; nothing was loaded",
            [
                ("source", source.catalog.source),
                *(("refused", f"{fault.key}: {fault.why}") for fault in coverage.refused),
            ],
            hint="from_pretrained can load them, on one device",
        )
    notes = (*source.notes, *merged)
    return Supply(going.source.catalog, going.weights, widened(coverage), "", notes)
