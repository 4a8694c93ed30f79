"""Reads an adapter: PEFT directories, MiniMind's files, and either inside other checkpoints.

Source: peft 0.21.2 ``utils/save_and_load.py``, ``tuners/tuners_utils.py``; jingyaogong/minimind
``model/model_lora.py`` at HEAD: ``W + B @ A``, without a scale.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, TensorEntry
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.adapters.fields import CONFIG, LoraFields, lora_fields, read_config
from dcpconv.sources.adapters.record import Adapter, LowRank
from dcpconv.sources.adapters.spotting import MINIMIND, PART, in_base, weights_of
from dcpconv.sources.fitting import bare
from dcpconv.stores.remote import RemotePath

_SAVED = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")


def open_adapter(path: Path) -> Catalog:
    """The tensors of an adapter.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed.
    """
    file = weights_of(path)
    if file is None and path.is_dir():
        inner = [item for item in path.iterdir() if item.is_dir() and weights_of(item)]
        if len(inner) == 1:
            return open_adapter(inner[0])
        if inner:
            raise NotACheckpointError(
                "there are several adapters in this directory",
                [("path", path), *(("adapter", item) for item in sorted(inner))],
                hint=f"name one: --adapter {min(inner)}",
            )
    return open_checkpoint(file or path)


def require_whole(path: Path, catalog: Catalog) -> None:
    """Refuses an adapter with tensors that hold nothing.

    Raises:
        FormatError: There are some; all are listed.
    """
    empty = [entry for entry in catalog.tensors.values() if not entry.numel]
    if empty:
        raise FormatError(
            f"{len(empty)} of the adapter's {len(catalog.tensors)} tensors hold nothing",
            [
                ("adapter", path),
                *(("empty", f"{entry.key}  {list(entry.shape)}") for entry in empty),
            ],
            hint="a run under DeepSpeed ZeRO-3 saved them without gathering: its global_step* has"
            " them; stage3_gather_16bit_weights_on_model_save gathers the next ones",
        )


def read_adapter(path: Path) -> Adapter:
    """What an adapter says, to be read along with a base: with whole paths.

    Raises:
        DcpconvError: As ``look_at_adapter``.
    """
    return with_whole_paths(look_at_adapter(path))


def look_at_adapter(path: Path) -> Adapter:
    """What an adapter says, from headers and its config; its files are named as it names them.

    Raises:
        NotACheckpointError: There is no adapter.
        NotExpressibleError: It is of a kind that cannot be merged.
        FormatError: A file is malformed, tensors hold nothing, or factors lack their counterpart;
            all are listed.
    """
    if not path.exists():
        raise NotACheckpointError("there is no such file or directory", [("adapter", path)])
    config = _config_of(path)
    fields = read_config(config) if config is not None else {}
    settled = lora_fields(fields, file=config) if config is not None else None
    catalog = open_adapter(path)
    require_whole(path, catalog)
    keys = {key: bare(key).removeprefix("module.") for key in catalog.tensors}
    if any(MINIMIND.fullmatch(key) for key in keys.values()):
        return _minimind(path, catalog, keys)
    if not any(PART.fullmatch(in_base(key)) for key in keys.values()):
        raise NotACheckpointError(
            "this is no adapter: no key is of LoRA",
            [("adapter", path), *(("key", key) for key in list(keys)[:5])],
            hint="--adapter takes a PEFT directory, or a file with keys such as X.lora_A.weight",
        )
    if settled is None:
        raise NotACheckpointError(
            f"the adapter has no {CONFIG}, which says what to multiply it by",
            [("adapter", path), ("expected", (path if path.is_dir() else path.parent) / CONFIG)],
            hint=f"copy {CONFIG} of the run there; its lora_alpha and r give the scale",
        )
    return _peft(path, catalog, keys, settled)


def _config_of(path: Path) -> Path | None:
    """The config of an adapter: in it, or above it for a checkpoint inside a run's step."""
    directory = path if path.is_dir() else path.parent
    file = weights_of(path)
    inner = [item for item in directory.iterdir() if item.is_dir() and weights_of(item)]
    one = inner if path.is_dir() and len(inner) == 1 else []
    places = [*([file.parent] if file else []), directory, *one, directory.parent]
    return next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)


def with_whole_paths(adapter: Adapter) -> Adapter:
    """The adapter with files that are found from anywhere: its base lies elsewhere."""
    here = adapter.catalog.path
    root = here.address if isinstance(here, RemotePath) else os.path.realpath(here)

    def whole(chunk: Chunk) -> Chunk:
        extent = replace(chunk.extent, file=f"{root}/{chunk.extent.file}")
        return replace(chunk, extent=extent)

    def moved(entry: TensorEntry) -> TensorEntry:
        return replace(entry, chunks=tuple(map(whole, entry.chunks)))

    tensors = {key: moved(entry) for key, entry in adapter.catalog.tensors.items()}
    updates = tuple(
        replace(
            one,
            a=moved(one.a),
            b=moved(one.b),
            magnitude=moved(one.magnitude) if one.magnitude else None,
            bias=moved(one.bias) if one.bias else None,
        )
        for one in adapter.updates
    )
    given = {key: moved(entry) for key, entry in adapter.given.items()}
    catalog = replace(adapter.catalog, tensors=tensors)
    return replace(adapter, catalog=catalog, updates=updates, given=given)


@dataclass(slots=True)
class _Parts:
    found: dict[str, TensorEntry] = field(default_factory=dict)


def _peft(path: Path, catalog: Catalog, keys: Mapping[str, str], settled: LoraFields) -> Adapter:
    parts: dict[str, _Parts] = {}
    given: dict[str, TensorEntry] = {}
    names: set[str] = set()
    frozen = 0
    for key, plain in keys.items():
        entry, told = catalog.tensors[key], in_base(plain)
        match = PART.fullmatch(told)
        if match is not None:
            names.add(match["name"] or "")
            part = match["part"] + ("_bias" if match["leaf"] == "bias" else "")
            parts.setdefault(match["module"] or "", _Parts()).found[part] = entry
        elif ".original_module." in told or told.endswith(".base_layer.weight"):
            frozen += 1
        else:
            name = _SAVED.sub("", told).replace(".base_layer.", ".")
            given[name] = entry
    if len(names) > 1:
        raise FormatError(
            "there are several adapters in one checkpoint",
            [("adapter", path), *(("name", name or "(none)") for name in sorted(names))],
            hint="save one of them with model.save_pretrained(DIR, selected_adapters=[NAME])",
        )
    faults: list[tuple[str, object]] = []
    updates = []
    for module, part in parts.items():
        update = _low_rank(module, part.found, parts, settled, faults)
        if update is not None:
            updates.append(update)
    if faults:
        raise FormatError("the adapter is not whole", [("adapter", path), *faults])
    note = f"{frozen} tensors of the adapter are the base's own, frozen ones; the base has them"
    return Adapter(
        path,
        "PEFT LoRA",
        catalog,
        tuple(updates),
        given,
        settled.base,
        (note,) if frozen else (),
        keeps_ties=settled.keeps_ties,
    )


def _low_rank(
    module: str,
    found: Mapping[str, TensorEntry],
    parts: Mapping[str, _Parts],
    settled: LoraFields,
    faults: list[tuple[str, object]],
) -> LowRank | None:
    is_embedding = any("embedding" in part for part in found)
    word = "lora_embedding_" if is_embedding else "lora_"
    a, b = found.get(f"{word}A"), found.get(f"{word}B")
    if a is None or b is None:
        faults.append(("missing", f"{module}.{word}{'A' if a is None else 'B'}"))
        return None
    name, parameter = _place(module, parts, settled)
    rank = settled.rank_of(name if parameter == "weight" else f"{name}.{parameter}")
    ok = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and a.numel and b.numel
    if not ok or (a.shape[0] != rank and (parameter == "weight" or a.shape[0] % rank)):
        shapes = f"A {list(a.shape)}, B {list(b.shape)}, where r is {rank}"
        faults.append(("misshapen", f"{module}  {shapes}"))
        return None
    magnitude = found.get("lora_magnitude_vector")
    if settled.is_dora != (magnitude is not None):
        says = "use_dora" if settled.is_dora else "no use_dora"
        faults.append(("magnitude", f"{module}: the config says {says}"))
        return None
    return LowRank(
        name,
        parameter,
        a,
        b,
        settled.scale_of(name if parameter == "weight" else f"{name}.{parameter}"),
        is_embedding,
        settled.fan_in_fan_out and not is_embedding,
        magnitude,
        found.get("lora_B_bias"),
        rank,
    )


def _place(module: str, parts: Mapping[str, _Parts], settled: LoraFields) -> tuple[str, str]:
    """Module and parameter that factors belong to.

    Parameters that are no ``weight`` are wrapped one around the other, in the order in which the
    module has them: the last one outermost, the others inside it as ``base_layer``.  transformers'
    experts have gate and up before down.
    """
    name = module
    depth = 0
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
        depth += 1
    below = {p.rpartition(".")[2] for p in settled.parameters if _is_below(name, p)}
    wanted = sorted(below, key=lambda parameter: ("gate_up" not in parameter, parameter))
    if not wanted:
        return name, "weight"
    deepest = depth
    while f"{name}{'.base_layer' * (deepest + 1)}" in parts:
        deepest += 1
    # Of those that are wrapped here, the innermost comes first.
    place = deepest - depth
    return (name, wanted[place]) if place < len(wanted) else (name, "weight")


def _is_below(module: str, parameter: str) -> bool:
    owner = parameter.rpartition(".")[0]
    return not owner or module == owner or module.endswith(f".{owner}")


def _minimind(path: Path, catalog: Catalog, keys: Mapping[str, str]) -> Adapter:
    pairs: dict[str, dict[str, TensorEntry]] = {}
    others = 0
    for key, plain in keys.items():
        match = MINIMIND.fullmatch(plain)
        if match is None:
            others += 1
        else:
            pairs.setdefault(match["module"], {})[match["part"]] = catalog.tensors[key]
    faults = list(_halves(pairs))
    if faults:
        raise FormatError("the adapter is not whole", [("adapter", path), *faults])
    updates = tuple(
        LowRank(module, "weight", pair["A"], pair["B"], 1.0, rank=pair["A"].shape[0])
        for module, pair in pairs.items()
    )
    note = f"{others} tensors beside the LoRA in {path.name} are left alone: the base counts"
    return Adapter(path, "MiniMind LoRA", catalog, updates, {}, "", (note,) if others else ())


def _halves(pairs: Mapping[str, Mapping[str, TensorEntry]]) -> Iterator[tuple[str, object]]:
    for module, pair in pairs.items():
        for part in "AB":
            if part not in pair:
                yield "missing", f"{module}.lora.{part}.weight"
        if len(pair) == 2:
            a, b = pair["A"].shape, pair["B"].shape
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                yield "misshapen", f"{module}  A {list(a)}, B {list(b)}"
