"""One conversion with everything about it decided, before anything is planned or moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Form, KeyPath
from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Outline, OutTensor
from dcpconv.core.spec import ModelSpec
from dcpconv.engine.space import block_size
from dcpconv.families import configs
from dcpconv.families.keymaps import Keymap
from dcpconv.families.side_files import SideFiles, carried, generated, untold
from dcpconv.formats import dcp, safetensors, torchfile
from dcpconv.formats.torchfile.nesting import key_of
from dcpconv.plan.block_scales import multiplied_out, not_in_blocks, stated_block
from dcpconv.plan.coverage import Coverage, Fault, Target, cover_as_stored
from dcpconv.plan.matching import cover
from dcpconv.plan.refusals import refused_features, require_expressible
from dcpconv.plan.ties import differing
from dcpconv.sources.numbers import require_said
from dcpconv.sources.recognition import Weights


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion, everything about it decided."""

    catalog: Catalog
    weights: Weights
    wanted: Keymap | None
    spec: ModelSpec | None
    form: Form
    target: Path
    assets: Path | None
    root: str | None
    dtype: DType | None
    cast_all: bool
    allow: tuple[str, ...]
    ranks: int = 1
    dequantize: bool = False

    @property
    def is_one_file(self) -> bool:
        """Whether the result is a file and not a directory."""
        return self.form == "torch" and self.ranks == 1

    @property
    def keeps_nesting(self) -> bool:
        """Whether keys go over with their containers, optimizer and all."""
        return self.wanted is None and self.form != "hf" and self.root is None

    @property
    def renames(self) -> bool:
        """Whether the naming changes."""
        return self.wanted is not None and self.wanted is not self.weights.keymap

    def cover(self) -> tuple[Coverage, tuple[str, ...]]:
        """The account of the conversion, and what to say about it."""
        if self.keeps_nesting:
            whole = replace(
                self.weights, entries=self.catalog.tensors, tied=self.catalog.tied, rest=()
            )
            return self._as_stored(whole), ()
        if self.wanted is None:
            return self._as_stored(self.weights), ()
        require_expressible(
            self.wanted,
            self._refusals(),
            self.allow,
            source=self.catalog.source,
            undone="nothing was written",
            allow_by="--allow NAME",
        )
        coverage = self._cover(self.spec)
        pairs = [pair for pair in coverage.tied if self._is_stored_twice(*pair)]
        if coverage and (unequal := differing(self.weights, pairs)):
            key, owner = unequal[0]
            if self.spec is None or self.weights.require_keymap().rows_like(key) == []:
                raise FormatError(
                    "two names of one tensor hold different values",
                    [("source", self.catalog.source), ("key", key), ("owner", owner)],
                    hint="load and save the model once, so that it is clear which one counts",
                )
            note = f"{key} and {owner} differ, so they are converted as two tensors"
            return self._cover(self.spec.model_copy(update={"tied": False})), (note,)
        return coverage, ()

    def _as_stored(self, weights: Weights) -> Coverage:
        coverage = cover_as_stored(weights)
        if not self.dequantize:
            return coverage
        block = stated_block(self.catalog, self.assets)
        coverage = multiplied_out(coverage, BY_NAME["bfloat16"], block)
        return replace(coverage, misshapen=(*coverage.misshapen, *not_in_blocks(coverage)))

    def _cover(self, spec: ModelSpec | None) -> Coverage:
        if self.wanted is None:
            return cover_as_stored(self.weights)
        return cover(
            self.weights,
            self.wanted,
            spec=spec,
            omit_ties=self.form == "hf",
            dequantize=BY_NAME["bfloat16"] if self.dequantize else None,
        )

    def _is_stored_twice(self, key: str, owner: str) -> bool:
        tied, entries = self.weights.tied, self.weights.entries
        return owner in entries and tied.get(key, key) != tied.get(owner, owner)

    def _refusals(self) -> tuple[Fault, ...]:
        if self.spec is None or self.wanted is None or not self.renames:
            return ()
        return refused_features(self.wanted, self.spec)

    @property
    def allowed(self) -> tuple[tuple[str, str], ...]:
        """What the target leaves out because the user said so."""
        return tuple((f.key, f.why) for f in self._refusals() if f.key in self.allow)

    def path_of(self, key: str) -> KeyPath:
        """Where a target key nests in the result."""
        if self.form == "hf":
            return (key,)
        if self.keeps_nesting:
            return self.catalog.path_of(key)
        root = self.root
        if root is None:
            root = self.wanted.root if self.wanted else ""
        return (*(part for part in root.split(".") if part), key)

    def dtype_of(self, target: Target) -> DType:
        """Element type of a target tensor: ``--dtype`` leaves vectors and integers alone."""
        if self.dtype is None or not target.dtype.is_floating_point:
            return target.dtype
        return self.dtype if self.cast_all or len(target.shape) >= 2 else target.dtype

    def outline(self, tensors: tuple[OutTensor, ...], *, max_file_size: int | None) -> Outline:
        """Where every byte of the result will be."""
        modulus = block_size(self.target)
        objects: Mapping[KeyPath, object] = (
            {self.catalog.path_of(key): value for key, value in self.catalog.objects.items()}
            if self.keeps_nesting
            else {}
        )
        opaque = [
            (key_of(path), value.reason)
            for path, value in objects.items()
            if isinstance(value, dcp.OpaqueObject)
        ]
        if opaque:
            raise FormatError(
                "the checkpoint holds objects that cannot be read without trust",
                [
                    ("source", self.catalog.source),
                    *(("object", f"{key}: {why}") for key, why in opaque),
                ],
                hint="--only model leaves them behind; or, if you trust whoever wrote this,"
                " --engine torch --trust",
            )
        if self.form == "hf":
            wordless = [t for t in tensors if t.dtype.safetensors is None]
            if wordless:
                raise FormatError(
                    "safetensors has no code for an element type",
                    [("key", f"{tensor.key}  {tensor.dtype.name}") for tensor in wordless],
                    hint="choose --form torch or dcp, or leave the tensors out with --only",
                )
            size = max_file_size or safetensors.MAX_FILE_SIZE
            return safetensors.outline(tensors, modulus=modulus, max_file_size=size)
        if self.form == "dcp":
            return dcp.outline(tensors, objects, modulus=modulus, max_file_size=max_file_size)
        return torchfile.outline(tensors, objects, filename=self.target.name, modulus=modulus)

    def side_files(self, coverage: Coverage, tensors: tuple[OutTensor, ...]) -> SideFiles:
        """Config and tokenizer to stand beside the weights."""
        if self.is_one_file:
            return self._nothing_beside()
        source = self.catalog.source
        directory = source if source.is_dir() else source.parent
        is_own = source.is_dir() or self.catalog.form == "hf"
        has_config = is_own and configs.find_config(directory) is not None
        is_untied = self.spec is not None and self.spec.tied and not coverage.is_tied
        tied = False if self.wanted is not None and is_untied else None
        if self.assets is not None and self._is_described_by(self.assets):
            return carried(self.assets, dtype=most_used(tensors), tied=tied)
        if self.wanted is not None and (self.renames or not has_config):
            if self.spec is not None and self.wanted.config:
                require_said(self.spec, self.weights)
            return generated(
                self.wanted,
                self.spec.model_copy(update={"tied": False})
                if self.spec is not None and is_untied
                else self.spec,
                form=self.form,
                target=self.target,
                source=directory,
                assets=self.assets or (directory if is_own else None),
                dtype=most_used(tensors),
                left_out=dict(self.allowed),
            )
        if not is_own:
            return SideFiles()
        return carried(self.assets or directory, dtype=self.dtype, tied=tied)

    def _nothing_beside(self) -> SideFiles:
        """A file has no place for another beside it, yet the code that reads it wants its sizes."""
        family = self.wanted.config if self.wanted is not None else ""
        if self.wanted is None or self.spec is None or not self.renames or not family:
            return SideFiles()
        name = configs.config_name(family)
        if name is None:
            return SideFiles(notes=(untold(self.wanted, self.spec),))
        command = f"dcpconv params {self.catalog.source} --to {self.wanted.name}"
        return SideFiles(notes=(f"one file is written, and no {name}; `{command}` prints it",))

    def _is_described_by(self, assets: Path) -> bool:
        """Whether the config of ``assets`` says of the result what we would: no size of it was
        stated otherwise, and no feature left out."""
        if self.form != "hf" or self.wanted is None or self.wanted.family != "hf":
            return False
        config = configs.find_config(assets)
        is_hf = config is not None and config.name == "config.json"
        return is_hf and configs.read_spec(assets) == self.spec

    def notes(self, coverage: Coverage) -> tuple[str, ...]:
        """What else to say."""
        notes = [
            f"{name} is not expressible in {coverage.target} and was left out ({why})"
            for name, why in self.allowed
        ]
        dropped = [] if self.keeps_nesting else [*self.weights.rest]
        if dropped:
            tops = sorted({str(self.catalog.path_of(key)[0]) for key in dropped})
            notes.append(
                f"{len(dropped)} entries beside the weights stay behind: {', '.join(tops[:6])}"
            )
        return tuple(notes)


def most_used(tensors: Iterable[OutTensor]) -> DType | None:
    """Element type of most bytes of floating-point tensors."""
    nbytes: Counter[DType] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            nbytes[tensor.dtype] += sum(chunk.fill.nbytes for chunk in tensor.chunks)
    return max(nbytes, key=lambda dtype: nbytes[dtype], default=None)
