"""Steps that are one file per rank: whether every rank's is there.

Source: DeepSpeed 0.19 ``runtime/engine.py`` (``save_checkpoint``, ``_get_ckpt_name``,
``_get_rank_zero_ckpt_name``, ``_get_optimizer_ckpt_name``): ``latest`` is written after all files;
volcengine/verl@58ee12f ``utils/checkpoint/checkpoint_manager.py``, ``fsdp_checkpoint_manager.py``:
``latest_checkpointed_iteration.txt`` likewise; NovaSky-AI/SkyRL calls it
``latest_ckpt_global_step.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from dcpconv.runs.glance import pickle_of
from dcpconv.runs.listing import Listing, absent_ranks

LATEST: Final = "latest"
TAG: Final = re.compile(r"global_step([0-9]{1,18})")
_OPTIMIZER = re.compile(
    r"((?:[a-z0-9]+_)?)zero_pp_rank_([0-9]{1,9})_mp_rank_([0-9]{1,9})_optim_states\.pt"
)
_MODEL = re.compile(r"zero_pp_rank_([0-9]{1,9})_mp_rank_([0-9]{1,9})_model_states\.pt")
_WHOLE = re.compile(r"mp_rank_([0-9]{1,9})_model_states\.pt")
_WORLD = re.compile(
    # A string, its place in the memo, and a whole number of one, two or four bytes.
    rb"dp_world_size(?:q.|r.{4}|\x94)?(?:K(.)|M(..)|J(.{4}))",
    re.DOTALL,
)
"""How many ranks saved, in the pickle of every model file."""

_MOST_RANKS: Final = 1 << 20
_EXPERTS = re.compile(r"expp_rank_[0-9]{1,9}_mp_rank_[0-9]{1,9}_optim_states\.pt")
_LAYER = re.compile(r"layer_[0-9]+-model_[0-9]+-model_states\.pt")
_VERL = re.compile(
    r"((?:.*/)?)(model|optim|extra_state)_world_size_([0-9]{1,9})_rank_([0-9]{1,9})\.pt"
)
MODEL_OF_RANK: Final = re.compile(r"pytorch_model_fsdp(?:_[0-9]{1,9})?_rank([0-9]{1,9})\.bin")
OPTIMIZER_OF_RANK: Final = re.compile(r"optimizer(?:_[0-9]{1,9})?_rank([0-9]{1,9})\.bin")
"""What accelerate writes for FSDP's local state dicts, and where DCP is turned off.

Source: accelerate 1.15 ``utils/fsdp_utils.py``."""

_TRACKERS: Final[Mapping[str, tuple[str, ...]]] = {
    "deepspeed": (LATEST,),
    "verl": ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt"),
}
"""Files of a run directory that name its newest finished step."""

TRACKERS: Final = frozenset(name for names in _TRACKERS.values() for name in names)

_NAMED: Final = 4096
"""Bytes of such a file; it holds one name."""


def tags(listing: Listing) -> list[str]:
    """The directories of a step into which DeepSpeed has saved."""
    return [name for name in listing.directories if TAG.fullmatch(name)]


def zero_problems(listing: Listing, *, ranks: int) -> list[str]:
    """Why DeepSpeed could not load the step that its Trainer has saved.

    Args:
        listing: A step with a tag directory and ``latest`` in it.
        ranks: How many ranks have saved at least, as other files say; 0 where nothing does.
    """
    if LATEST not in listing.files:
        return [f"no {LATEST}: DeepSpeed would load nothing"]
    tag = _text(listing.read(LATEST, last=_NAMED))
    if not tag or tag not in listing.directories:
        return [f"{LATEST} names {tag[:80]!r}, and there is no such directory"]
    return tag_problems(listing, f"{tag}/", ranks=ranks)


def tag_problems(listing: Listing, prefix: str, *, ranks: int) -> list[str]:
    """Which rank files a directory of DeepSpeed lacks.

    Args:
        listing: The step.
        prefix: Of the directory inside the step, with a slash at its end; empty for the step.
        ranks: How many ranks have saved at least; 0 where nothing says.
    """
    names = [
        name.removeprefix(prefix)
        for name in listing.files
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    ]
    optimizers = [found for name in names if (found := _OPTIMIZER.fullmatch(name))]
    parts = [found for name in names if (found := _MODEL.fullmatch(name))]
    whole = [found for name in names if (found := _WHOLE.fullmatch(name))]
    where = prefix.rstrip("/") or "the step"
    if not (parts or whole or any(map(_LAYER.fullmatch, names))):
        return [f"{where} holds no model states: neither one file nor one of every rank"]
    columns = {int(found[3]) for found in optimizers} | {int(found[2]) for found in parts}
    columns |= {int(found[1]) for found in whole}
    lost = absent_ranks(columns, at_least=1)
    problems = [f"{prefix}files of mp_rank_{column:02} are missing" for column in lost]
    rows = {int(found[2]) for found in optimizers} | {int(found[1]) for found in parts}
    inside = pickle_of(listing, prefix + (whole or parts)[0][0]) if whole or parts else b""
    said = _WORLD.search(inside)
    stated = int.from_bytes(said[1] or said[2] or said[3], "little") if said else 0
    least = max(ranks // max(1, len(columns)), min(stated, _MOST_RANKS))
    world = max([least, *(row + 1 for row in rows)])
    for column in sorted(columns) if optimizers else ():
        there = {int(found[2]) for found in optimizers if int(found[3]) == column}
        start = f"{prefix}{optimizers[0][1]}zero_pp_rank_"
        problems += [
            f"{start}{rank}_mp_rank_{column:02}_optim_states.pt is missing"
            for rank in absent_ranks(there, at_least=world)
        ]
    for column in sorted(columns) if parts else ():
        there = {int(found[1]) for found in parts if int(found[2]) == column}
        problems += [
            f"{prefix}zero_pp_rank_{rank}_mp_rank_{column:02}_model_states.pt is missing"
            for rank in absent_ranks(there, at_least=world)
        ]
    if not optimizers and not any(map(_EXPERTS.fullmatch, names)):
        # Without ZeRO the optimizer is in the model's file.
        is_there = whole and b"param_groups" in inside
        problems += [] if is_there else [f"{where} holds no optimizer states of any rank"]
    return problems


def is_read(listing: Listing, prefix: str) -> bool:
    """Whether rank files of DeepSpeed can be put together: not those of pipeline stages, experts
    or tensor parallelism.

    Args:
        listing: The step.
        prefix: Of their directory inside the step, with a slash at its end; empty for the step.
    """
    names = [name.removeprefix(prefix) for name in listing.files if name.startswith(prefix)]
    if any(_EXPERTS.fullmatch(name) or _LAYER.fullmatch(name) for name in names):
        return False
    columns = {int(found[1]) for name in names if (found := _WHOLE.fullmatch(name))}
    columns |= {int(found[2]) for name in names if (found := _MODEL.fullmatch(name))}
    return columns == {0}


def verl_weights(listing: Listing) -> str | None:
    """The directory of a step of verl in which the model's rank files lie: the actor's, where there
    are several; ``None`` where there is none."""
    found = {
        match[1]
        for name in listing.files
        if (match := _VERL.fullmatch(name)) and match[2] == "model"
    }
    named = [name.rstrip("/") for name in sorted(found)]
    first = [name for name in named if name.rpartition("/")[2] in {"actor", "policy"}]
    return next(iter([*first, *named]), None)


def is_deepspeed(listing: Listing) -> bool:
    """Whether the files right in a directory are DeepSpeed's."""
    return any(_OPTIMIZER.fullmatch(n) or _WHOLE.fullmatch(n) for n in listing.files)


def is_verl(listing: Listing) -> bool:
    """Whether a directory holds rank files of verl, or directories with some."""
    return any(map(_VERL.fullmatch, listing.files))


def verl_problems(listing: Listing, *, kinds: frozenset[str]) -> tuple[set[str], list[str]]:
    """Which kinds of rank files a step of verl has, and which files it lacks.

    Args:
        listing: The step; its ``actor``, ``critic`` or ``policy`` hold files of their own.
        kinds: Those to judge, of ``model``, ``optim`` and ``extra_state``.
    """
    found: dict[str, dict[str, set[tuple[int, int]]]] = {}
    for name in listing.files:
        match = _VERL.fullmatch(name)
        if match and match[2] in kinds:
            ranks = found.setdefault(match[1], {}).setdefault(match[2], set())
            ranks.add((int(match[3]), int(match[4])))
    there = {kind for kinds_there in found.values() for kind in kinds_there}
    problems = [] if "model" in there else ["no model_world_size_N_rank_R.pt of any rank"]
    for prefix, kinds_there in sorted(found.items()):
        sizes = sorted({size for ranks in kinds_there.values() for size, _ in ranks})
        if len(sizes) > 1:
            where = prefix.rstrip("/") or "the step"
            several = " and of ".join(map(str, sizes))
            problems.append(f"{where} holds files of {several} ranks: of different saves")
            continue
        for kind, ranks in sorted(kinds_there.items()):
            lost = absent_ranks({rank for _, rank in ranks}, at_least=sizes[0])
            start = f"{prefix}{kind}_world_size_{sizes[0]}_rank_"
            problems += [f"{start}{rank}.pt is missing" for rank in lost]
    return there, problems


def is_optimizer_file(name: str) -> bool:
    """Whether a rank file holds nothing but a part of the optimizer."""
    base = name.rpartition("/")[2]
    match = _VERL.fullmatch(name)
    if match:
        return match[2] == "optim"
    if OPTIMIZER_OF_RANK.fullmatch(name):
        return True
    return _OPTIMIZER.fullmatch(base) is not None or _EXPERTS.fullmatch(base) is not None


def tracked(trackers: Mapping[str, bytes]) -> Iterator[tuple[str, str, int | None]]:
    """Of every layout: the file that names the newest step, and that step's number.

    ``None`` for the number where the file does not exist or says something else.

    Args:
        trackers: Contents of these files in the run directory, by name.
    """
    for layout, names in _TRACKERS.items():
        name = next((name for name in names if name in trackers), names[0])
        text = _text(trackers.get(name, b""))
        match = TAG.fullmatch(text) or re.fullmatch(r"([0-9]{1,18})", text)
        yield layout, name, int(match[1]) if match else None


def _text(data: bytes) -> str:
    return data[:_NAMED].decode("utf-8", "replace").strip()
