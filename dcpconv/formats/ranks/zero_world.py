"""The files of all ranks of a DeepSpeed run: found, and held to be of one save of one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from dcpconv.core.catalog import Identity
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks.zero_files import (
    MODEL_FILE,
    OPTIM_FILE,
    PARTIAL_FILE,
    ModelFile,
    OptimFile,
    read_model_file,
    read_optim_file,
    read_pickle,
)

LATEST = "latest"
_File = TypeVar("_File", ModelFile, OptimFile)
_SAVED_AGAIN = "the save was interrupted, or two runs were saved into one directory"


@dataclass(frozen=True, slots=True)
class ZeroWorld:
    """The files of one save.

    Attributes:
        directory: Where they lie: ``global_stepN``.
        models: By rank for stage 3, whose ranks have a part of every parameter each; else one.
        optims: By rank; empty where no optimizer was saved.
    """

    directory: Path
    models: tuple[ModelFile, ...]
    optims: tuple[OptimFile, ...]

    @property
    def stage(self) -> int:
        """How far ZeRO went: 3 splits parameters, 1 and 2 leave them whole, 0 was not used."""
        return self.optims[0].stage if self.optims else self.models[0].stage or 0

    @property
    def files(self) -> dict[str, int]:
        """Length of every file, by name."""
        models = {model.file: model.nbytes for model in self.models}
        return models | {optim.file: optim.nbytes for optim in self.optims}

    @property
    def identities(self) -> dict[str, Identity]:
        """What every file was when it was read, by name."""
        models = {model.file: model.identity for model in self.models}
        return models | {optim.file: optim.identity for optim in self.optims}


def find(path: Path) -> Path | None:
    """The directory of rank files that ``path`` is or leads to; ``None`` where it is none.

    Raises:
        FormatError: ``latest`` names no such directory, or several are there and none is chosen.
    """
    if not path.is_dir():
        return None
    if _is_world(path):
        return path
    inside = sorted(d for d in path.iterdir() if d.is_dir() and _is_world(d))
    pointer = path / LATEST
    if pointer.is_file() and pointer.stat().st_size < 4096:
        tag = pointer.read_text(errors="replace").strip()
        chosen = path / tag
        if tag and "/" not in tag and "\0" not in tag and chosen in inside:
            return chosen
        if inside:
            raise FormatError(
                "latest names no directory of rank files",
                [("file", pointer), ("names", tag), *(("found", d.name) for d in inside)],
                hint=f"name the directory: {inside[-1]}",
            )
    if len(inside) > 1 and all(re.fullmatch(r"global_step\d+", d.name) for d in inside):
        raise FormatError(
            "several steps of a DeepSpeed run, and no file named latest",
            [("directory", path), *(("found", d.name) for d in inside)],
            hint=f"name one: {inside[-1]}",
        )
    return inside[0] if len(inside) == 1 else None


def read_world(directory: Path, root: Path | None = None) -> ZeroWorld:
    """Reads the headers of all files of one save.

    Args:
        directory: As ``find`` returns it.
        root: Directory that file names are relative to; ``directory`` by default.

    Raises:
        FormatError: A file is missing, damaged, of another step or of another world size; or the
            run was split in a way that is not read.
    """
    root = root or directory
    names = sorted(item.name for item in directory.iterdir())
    _refuse_partial(directory, names)
    optim_names = _by_rank(directory, names, OPTIM_FILE)
    model_names = _by_rank(directory, names, MODEL_FILE)

    def at(name: str) -> tuple[Path, str]:
        return directory / name, (directory / name).relative_to(root).as_posix()

    optims = {rank: read_optim_file(*at(name)) for rank, name in optim_names.items()}
    if optims:
        _check_ranks(directory, optims, optim_names)
    stage = next(iter(optims.values())).stage if optims else 0
    if stage == 3:
        chosen = {rank: name for rank, name in model_names.items() if rank >= 0}
        _complete(directory, chosen, len(optims), "zero_pp_rank_0_mp_rank_00_model_states.pt")
    else:
        chosen = {rank: name for rank, name in model_names.items() if rank < 0}
        if not chosen and not optims:
            raise _no_weights(directory, model_names)
        _complete(directory, dict(enumerate(chosen.values())), 1, "mp_rank_00_model_states.pt")
    world = ZeroWorld(
        directory,
        tuple(_read_models([at(chosen[rank]) for rank in sorted(chosen)])),
        tuple(optims[rank] for rank in sorted(optims)),
    )
    _check_world(world)
    return world


def _read_models(places: Sequence[tuple[Path, str]]) -> Iterator[ModelFile]:
    """The model files, of which only the first keeps its tensors.

    Of a thousand ranks' files most have the same pickle, byte for byte: it is read once.  Not so
    where parameters are frozen, because every rank has its own share of them.
    """
    first = read_model_file(*places[0])
    yield first
    parsed: dict[bytes, ModelFile] = {}
    for path, file in places[1:]:
        pickle, identity = (b"", first.identity) if first.fragments else read_pickle(path)
        digest = sha256(pickle).digest()
        if first.fragments or digest not in parsed:
            model = read_model_file(path, file)
            groups = first.groups if model.groups == first.groups else model.groups
            parsed[digest] = replace(model, module={}, groups=groups)
            identity = model.identity
        yield replace(parsed[digest], file=file, identity=identity)


def _is_world(path: Path) -> bool:
    if (path / "zero").is_dir():
        return False  # a universal checkpoint has the model files too
    return any(
        MODEL_FILE.fullmatch(item.name) or OPTIM_FILE.fullmatch(item.name)
        for item in path.iterdir()
    )


def _by_rank(directory: Path, names: Iterable[str], pattern: re.Pattern[str]) -> dict[int, str]:
    """File of every rank; -1 is the rank of a file that all have in common."""
    found: dict[int, str] = {}
    again: list[tuple[str, object]] = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match["mp"]):
            raise FormatError(
                "the model was split by tensor or pipeline parallelism, which is not read",
                [("file", directory / name), ("expected", "mp_rank_00 alone")],
                hint="merge the model-parallel ranks with the trainer that wrote them",
            )
        rank = int(match["rank"]) if match["rank"] else -1
        if rank in found:
            again += [("found", found[rank]), ("found", name)]
        found[rank] = name
    if again:
        raise FormatError(
            "two files are of one rank", [("directory", directory), *again], hint=_SAVED_AGAIN
        )
    return found


def _refuse_partial(directory: Path, names: Iterable[str]) -> None:
    partial = [name for name in names if PARTIAL_FILE.fullmatch(name)]
    if partial:
        raise FormatError(
            "files of pipeline stages or of experts are not put together",
            [("directory", directory), *(("found", name) for name in partial[:4])],
            hint="export the model with the trainer that wrote it",
        )


def _check_ranks(
    directory: Path, optims: Mapping[int, OptimFile], names: Mapping[int, str]
) -> None:
    first = min(optims)
    counts = optims[first].counts
    if len(set(counts)) > 1:
        raise FormatError(
            "parameter groups are split among different numbers of ranks, which is not read",
            [("file", directory / names[first]), ("partition_count", list(counts))],
        )
    _complete(directory, names, counts[0] or len(optims), names[first])
    _same(directory, optims, names, "partition_count", lambda o: str(list(o.counts)))
    _same(directory, optims, names, "zero_stage", lambda o: str(o.stage))
    _same(directory, optims, names, "step", lambda o: "" if o.step is None else f"{o.step:g}")


def _complete(directory: Path, names: Mapping[int, str], ranks: int, like: str) -> None:
    """Every rank has a file, and there are no others."""
    wanted = {rank: re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", like) for rank in range(ranks)}
    missing = [name for rank, name in wanted.items() if rank not in names]
    if missing:
        raise FormatError(
            "rank files are missing",
            [
                ("directory", directory),
                ("expected", f"{ranks} of their kind, found {len(names)}"),
                *(("missing", name) for name in missing[:8]),
                *([("missing", f"and {len(missing) - 8} more")] if len(missing) > 8 else []),
            ],
            hint="copy the missing files from their node; the others cannot be used without",
        )
    surplus = [name for rank, name in names.items() if rank not in wanted]
    if surplus:
        raise FormatError(
            "there are more rank files than the run had ranks",
            [
                ("directory", directory),
                ("expected", f"{ranks}"),
                *(("found", name) for name in surplus[:8]),
            ],
            hint=_SAVED_AGAIN,
        )


def _same(
    directory: Path,
    files: Mapping[int, _File],
    names: Mapping[int, str],
    what: str,
    said: Callable[[_File], str],
) -> None:
    """All files say the same; those that differ from most are named."""
    values: dict[int, str] = {rank: said(file) for rank, file in files.items()}
    if len(set(values.values())) > 1:
        usual = max(values.values(), key=[*values.values()].count)
        differing: list[int] = [rank for rank, value in values.items() if value != usual]
        raise FormatError(
            f"rank files differ in their {what}",
            [
                ("directory", directory),
                ("expected", f"{what} {usual}"),
                *(("file", f"{names[rank]}: {what} {values[rank]}") for rank in differing[:8]),
            ],
            hint=_SAVED_AGAIN,
        )


def _check_world(world: ZeroWorld) -> None:
    first = world.models[0]
    at = world.directory
    if first.model_ranks > 1:
        raise FormatError(
            "the model was split by tensor or pipeline parallelism, which is not read",
            [("file", at / Path(first.file).name), ("mp_world_size", first.model_ranks)],
            hint="merge the model-parallel ranks with the trainer that wrote them",
        )
    models = dict(enumerate(world.models))
    names = {rank: Path(model.file).name for rank, model in models.items()}
    _same(at, models, names, "global_steps", lambda model: str(model.step))
    _same(
        at,
        models,
        names,
        "parameters",
        lambda model: (
            "those of rank 0"
            if (model.groups, model.frozen) == (first.groups, first.frozen)
            else f"{sum(map(len, model.groups))} others"
        ),
    )
    if world.optims and first.ranks not in {0, len(world.optims)}:
        raise FormatError(
            "optimizer files are of another number of ranks than the model file",
            [
                ("file", at / Path(first.file).name),
                ("expected", f"{first.ranks} optimizer files"),
                ("found", len(world.optims)),
            ],
            hint=_SAVED_AGAIN,
        )


def _no_weights(directory: Path, names: Mapping[int, str]) -> FormatError:
    return FormatError(
        "there are no optimizer files, and the model files of stage 3 hold no weights",
        [("directory", directory), *(("found", name) for name in [*names.values()][:4])],
        hint="copy the *_optim_states.pt files here; the weights are in them",
    )
