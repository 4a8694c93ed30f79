"""One conversion with everything about it decided, before anything is planned or moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dcpconv.conversion import metadata
from dcpconv.conversion.request import Wanted
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
from dcpconv.plan.account import Aim
from dcpconv.plan.coverage import Coverage, Target
from dcpconv.sources.numbers import require_said

_PRODUCT = BY_NAME["bfloat16"]
"""What weights in scaled blocks are multiplied out into, unless the user wants another type."""


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion, everything about it decided.

    Attributes:
        aim: The source and the naming to reach.
        wanted: What the result should be.
        form: How its bytes are stored.
    """

    aim: Aim
    wanted: Wanted
    form: Form

    @property
    def catalog(self) -> Catalog:
        """Everything the source holds."""
        return self.aim.source.catalog

    @property
    def target(self) -> Path:
        """Where the result goes."""
        return self.wanted.path

    @property
    def is_one_file(self) -> bool:
        """Whether the result is a file and not a directory."""
        return self.wanted.is_one_file(self.form)

    @property
    def keeps_nesting(self) -> bool:
        """Whether keys go over with their containers, optimizer and all."""
        return self.aim.table is None and self.form != "hf" and self.wanted.root is None

    def cover(self) -> tuple[Coverage, tuple[str, ...]]:
        """The account of the conversion, and what to say about it."""
        if self.keeps_nesting:
            coverage = self.aim.stored(product=_PRODUCT, whole=True)
        else:
            self.aim.require_expressible(undone="nothing was written", allow_by="--allow NAME")
            return self.aim.cover_by_data(product=_PRODUCT)
        return coverage, ()

    def path_of(self, key: str) -> KeyPath:
        """Where a target key nests in the result."""
        if self.form == "hf":
            return (key,)
        if self.keeps_nesting:
            return self.catalog.path_of(key)
        root = self.wanted.root
        if root is None:
            root = self.aim.table.root if self.aim.table else ""
        return (*(part for part in root.split(".") if part), key)

    def dtype_of(self, target: Target) -> DType:
        """Element type of a target tensor: ``--dtype`` leaves vectors and integers alone."""
        dtype = self.wanted.dtype
        if dtype is None or not target.dtype.is_floating_point:
            return target.dtype
        return dtype if self.wanted.cast_all or len(target.shape) >= 2 else target.dtype

    def outline(self, tensors: tuple[OutTensor, ...]) -> Outline:
        """Where every byte of the result will be."""
        max_file_size = self.wanted.max_file_size
        modulus = block_size(self.target)
        kept = self.catalog.objects if self.keeps_nesting else {}
        objects = {self.catalog.path_of(key): value for key, value in kept.items()}
        opaque = [
            (key, value.reason)
            for key, value in kept.items()
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
            entries = metadata.metadata_for(self.aim, [tensor.key for tensor in tensors])
            return safetensors.outline(
                tensors,
                modulus=modulus,
                max_file_size=size,
                metadata=entries,
                stem=self.wanted.stem,
            )
        if self.form == "dcp":
            return dcp.outline(
                tensors,
                objects,
                modulus=modulus,
                max_file_size=max_file_size,
                stem=self.wanted.stem,
            )
        return torchfile.outline(tensors, objects, filename=self.target.name, modulus=modulus)

    def side_files(self, coverage: Coverage, tensors: tuple[OutTensor, ...]) -> SideFiles:
        """Config, tokenizer and what else is to stand beside the weights."""
        if self.is_one_file:
            return self._nothing_beside()
        side = self._beside(coverage, tensors)
        entries = metadata.metadata_for(self.aim, [tensor.key for tensor in tensors])
        return replace(side, files=(*side.files, *metadata.side_file(entries, self.form)))

    def _beside(self, coverage: Coverage, tensors: tuple[OutTensor, ...]) -> SideFiles:
        going, source = self.aim, self.catalog.source
        table, spec, assets = going.table, going.spec, going.source.said.assets
        directory = source if source.is_dir() else source.parent
        is_own = source.is_dir() or self.catalog.form == "hf"
        has_config = is_own and configs.find_config(directory) is not None
        is_untied = spec is not None and spec.tied and not coverage.is_tied
        tied = False if table is not None and is_untied else None
        if assets is not None and self._is_described_by(assets):
            stored = self.wanted.dtype if self._is_quantized() else most_used(tensors)
            return carried(assets, dtype=stored, tied=tied)
        if table is not None and (going.renames or not has_config):
            if spec is not None and table.config:
                require_said(spec, going.weights)
                spec = _as_it_goes(spec, table, coverage, is_untied=is_untied)
            return generated(
                table,
                spec,
                form=self.form,
                target=self.target,
                source=directory,
                assets=assets or (directory if is_own else None),
                dtype=most_used(tensors),
                left_out=dict(going.allowed),
            )
        if not is_own and assets is None:
            return SideFiles()
        return carried(assets or directory, dtype=self.wanted.dtype, tied=tied)

    def _is_quantized(self) -> bool:
        """Whether the parameter file speaks of packed weights: its element type is then that of
        the model that they are unpacked into."""
        parameters = self.aim.source.parameters
        return parameters is not None and bool(parameters.quantized_by)

    def _nothing_beside(self) -> SideFiles:
        """A file has no place for another beside it, yet the code that reads it wants its sizes."""
        table, spec = self.aim.table, self.aim.spec
        if table is None or spec is None or not self.aim.renames or not table.config:
            return SideFiles()
        name = configs.config_name(table.config)
        if name is None:
            return SideFiles(notes=(untold(table, spec),))
        command = f"dcpconv params {self.catalog.source} --to {table.name}"
        return SideFiles(notes=(f"one file is written, and no {name}; `{command}` prints it",))

    def _is_described_by(self, assets: Path) -> bool:
        """Whether the config of ``assets`` says of the result what we would: no size of it was
        stated otherwise, and no feature left out."""
        if self.form != "hf" or self.aim.table is None or self.aim.table.family != "hf":
            return False
        config = configs.find_config(assets)
        is_hf = config is not None and config.name == "config.json"
        return is_hf and configs.read_spec(assets) == self.aim.spec

    def notes(self, coverage: Coverage) -> tuple[str, ...]:
        """What else to say."""
        notes = [
            f"{name} is not expressible in {coverage.target} and was left out ({why})"
            for name, why in self.aim.allowed
        ]
        if coverage.kept:
            names = [fault.key for fault in coverage.kept]
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            notes.append(
                f"{len(coverage.kept)} keys that {coverage.source} does not list are kept as"
                f" stored: {some}"
            )
        notes.extend(self.wanted.without_effect(self.form))
        notes.extend(metadata.lost(self.aim, is_one_file=self.is_one_file))
        dropped = [] if self.keeps_nesting else [*self.aim.weights.rest]
        if dropped:
            tops = sorted({str(self.catalog.path_of(key)[0]) for key in dropped})
            notes.append(
                f"{len(dropped)} entries beside the weights stay behind: {', '.join(tops[:6])}"
            )
        return tuple(notes)


def _as_it_goes(
    spec: ModelSpec, table: Keymap, coverage: Coverage, *, is_untied: bool
) -> ModelSpec:
    """The model as its tensors go: with a head of its own, without a tower where none goes along.

    A class of transformers has its tower all the same.
    """
    changed: dict[str, object] = {"tied": False} if is_untied else {}
    has_none = bool(table.kept) and not any(target.part for target in coverage.targets)
    if has_none and table.family != "hf":
        changed["stated"] = {k: v for k, v in spec.stated.items() if k != "vision_config"}
    return spec.model_copy(update=changed) if changed else spec


def most_used(tensors: Iterable[OutTensor]) -> DType | None:
    """Element type of most bytes of floating-point tensors; one byte is how a type is packed."""
    nbytes: Counter[DType] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            nbytes[tensor.dtype] += sum(chunk.fill.nbytes for chunk in tensor.chunks)
    return max(nbytes, key=lambda dtype: nbytes[dtype], default=None)
