"""What stands beside the weights: parameter files, tokenizers, and what Hugging Face adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.catalog import Form
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import NotExpressibleError, SpecError
from dcpconv.core.outline import Outline
from dcpconv.core.spec import ModelSpec
from dcpconv.families.beside import files_beside
from dcpconv.families.configs import home, to_text, write_config
from dcpconv.families.family import family_of
from dcpconv.families.keymaps import Keymap

_QUANTIZED = "hf_quant_config.json"
"""What Model Optimizer writes of its scales, beside config.json."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to stand beside the weights: written text, or a copy of ``origin``."""

    name: str
    text: str | None = None
    origin: Path | None = None

    def read(self) -> bytes:
        """Its bytes."""
        return self.text.encode() if self.text is not None else (self.origin or Path()).read_bytes()


@dataclass(frozen=True, slots=True)
class SideFiles:
    """Files beside the weights and what the user should know about them."""

    files: tuple[SideFile, ...] = ()
    notes: tuple[str, ...] = ()


def carried(
    directory: Path,
    *,
    dtype: DType | None,
    tied: bool | None,
) -> SideFiles:
    """Copies of what stands beside the weights of the same family.

    Args:
        directory: Where the source, or ``--assets``, keeps it.
        dtype: Element type the tensors were cast to; ``config.json`` then says so.
        tied: Whether head and embedding are one tensor, where that differs from the config.
    """
    beside = files_beside(home(directory))
    files = []
    for name, path in beside.files.items():
        text = _patched(path, dtype=dtype, tied=tied) if name == "config.json" else None
        files.append(SideFile(name, text=text, origin=None if text else path))
    return SideFiles(tuple(files), beside.notes)


def generated(
    keymap: Keymap,
    spec: ModelSpec | None,
    *,
    form: Form,
    target: Path,
    source: Path,
    assets: Path | None,
    dtype: DType | None,
    left_out: Mapping[str, str],
) -> SideFiles:
    """The parameter file of another family, and the tokenizer that it needs.

    Args:
        keymap: The family that is written.
        spec: The model's numbers; without them no parameter file can be written.
        form: Form of the result.
        target: Where the result will be, as the user typed it: Lingua's file names the tokenizer.
        source: Directory of the source.
        assets: Where tokenizer and config are: the source's own directory, or what the user says.
        dtype: Element type of most tensors.
        left_out: Features that the family cannot express and the user overruled, by name; the file
            keeps them under ``dcpconv``, which Lingua's ``generate.py`` and ``eval.py`` pass over.
    """
    family = family_of(keymap.config)
    name = None if family is None else family.file
    if name is None and keymap.config and spec is not None:
        return SideFiles(notes=(untold(keymap, spec),))
    if name is None:
        return SideFiles()
    if spec is None:
        note = f"no {name} was written: no config was found beside the source; see --assets"
        return SideFiles(notes=(note,))
    files: list[SideFile] = []
    notes: list[str] = []
    tokenizer: tuple[str, str] | None = None
    directory = home(assets or source)
    if family is not None and family.names_tokenizer:
        kind, origin = _lingua_tokenizer(directory)
        if origin is not None:
            files.append(SideFile("tokenizer.model", origin=origin))
            tokenizer = (kind, (target / "tokenizer.model").as_posix())
        else:
            notes.append(
                "no tokenizer.model beside the source: params.json names Lingua's bytes tokenizer"
            )
    elif form == "hf" and assets is not None:
        beside = carried(assets, dtype=None, tied=None)
        files += [file for file in beside.files if not _is_of_family(file.name)]
    try:
        fields = write_config(
            keymap.parameter_family,
            spec,
            dtype=dtype.label if dtype else None,
            tokenizer=tokenizer,
        )
    except (SpecError, NotExpressibleError) as error:
        return SideFiles(tuple(files), (*notes, f"no {name} was written: {error.headline}"))
    if left_out:
        fields = {**fields, "dcpconv": {"left_out": dict(left_out)}}
    files.insert(0, SideFile(name, text=to_text(fields)))
    return SideFiles(tuple(files), tuple(notes))


def untold(keymap: Keymap, spec: ModelSpec) -> str:
    """What to write into the code of a family that has no parameter file."""
    facts = [f"{spec}"]
    if spec.experts is not None:
        weights = "sum to one" if spec.experts.norm_topk else "stay as the softmax has them"
        facts.append(f"expert width {spec.experts.ffn_size}, weights of the chosen {weights}")
        if spec.experts.dense_layers:
            facts.append(f"dense layers {', '.join(map(str, spec.experts.dense_layers))}")
    if spec.tied:
        facts.append("head and embedding tied")
    told = "; ".join(facts)
    return f"{keymap.name} has no parameter file; its code has to be told: {told}"


def dequantized(side: SideFiles, dtype: DType | None) -> SideFiles:
    """The same files where none speaks of quantized weights any more."""
    files = []
    for file in side.files:
        if file.name == _QUANTIZED:
            continue
        if file.name == "config.json":
            fields = json.loads(file.read())
            for holder in (fields, *(some for some in fields.values() if isinstance(some, dict))):
                holder.pop("quantization_config", None)
                holder.pop("compression_config", None)
            if dtype is not None:
                fields |= {"dtype": dtype.name, "torch_dtype": dtype.name}
            files.append(SideFile(file.name, text=to_text(fields)))
        else:
            files.append(file)
    return SideFiles(tuple(files), side.notes)


def _is_of_family(name: str) -> bool:
    """Whether a file speaks of how the tensors are named, as a tokenizer does not."""
    is_code = name.startswith(("modeling_", "configuration_")) and name.endswith(".py")
    return is_code or name in {"config.json", "params.json"}


def _lingua_tokenizer(directory: Path) -> tuple[str, Path | None]:
    """Lingua's name for a tokenizer and the file it reads.

    Source: ``lingua/tokenizer.py``: ``tiktoken`` reads a BPE rank file, which Llama 3 repositories
    keep in ``original/``; ``sp`` a SentencePiece model.
    """
    tiktoken = directory / "original" / "tokenizer.model"
    if tiktoken.is_file():
        return "tiktoken", tiktoken
    plain = directory / "tokenizer.model"
    if plain.is_file():
        # A rank file is text, base64 and a number per line; SentencePiece is a protocol buffer.
        head = plain.read_bytes()[:256]
        is_text = b"\n" in head and all(32 <= byte < 127 or byte == 10 for byte in head)
        return ("tiktoken" if is_text else "sp"), plain
    return "bytes", None


def _patched(path: Path, *, dtype: DType | None, tied: bool | None) -> str | None:
    """The config with what has changed; ``None`` where it says so already, or is no JSON."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    changed = dict(fields)
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in fields]
        changed |= dict.fromkeys(names or ["dtype"], dtype.name)
        if names == ["torch_dtype"] and changed != fields:
            changed["dtype"] = dtype.name
    if tied is not None:
        changed["tie_word_embeddings"] = tied
    if changed == fields:
        return None
    return json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def disk_nbytes(outline: Outline, side: SideFiles) -> int:
    """Bytes of every file of a result."""
    beside = sum(
        len(file.text.encode()) if file.text is not None else (file.origin or Path()).stat().st_size
        for file in side.files
    )
    commit = sum(len(data) for _, data in outline.commit)
    return sum(file.nbytes for file in outline.files) + commit + beside
