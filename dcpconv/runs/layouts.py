"""Which names are steps of a run, and what makes each kind of step complete.

Source: transformers 5.23 ``trainer.py``, ``trainer_utils.py``; facebookresearch/lingua@437d680
``lingua/checkpoint.py``; accelerate 1.15 ``accelerator.py``, ``utils/fsdp_utils.py``;
jingyaogong/minimind@d65ef2c ``trainer/trainer_utils.py``; torchtitan ``checkpoint.py``.
DeepSpeed's and verl's are in ``rank_files``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from dcpconv.core.catalog import Form
from dcpconv.runs import rank_files
from dcpconv.runs.glance import glance
from dcpconv.runs.listing import (
    METADATA,
    Listing,
    dcp_problems,
    is_whole_json,
    missing_ranks,
    ranks_that_saved,
)

Layout = Literal[
    "hf-trainer", "lingua", "torchtitan", "accelerate", "minimind", "deepspeed", "verl", "dcp"
]
"""Whose directory a step is; ``dcp`` is a plain DCP directory that was named by its path."""

HELD: Final = ("weights", "adapter", "optimizer", "scheduler", "scaler", "rng", "trainer state")
"""What a step can hold, in the order it is told; an adapter is weights without their base."""

# Matched whole: ``checkpoint-500.tmp``, ``checkpoint-best``, ``.ipynb_checkpoints`` are no steps.
# At most 18 digits, for Python refuses to read thousands of them as one number.
_DIRECTORIES: Final[tuple[tuple[Layout, re.Pattern[str]], ...]] = (
    ("hf-trainer", re.compile(r"checkpoint-([0-9]{1,18})")),
    ("lingua", re.compile(r"([0-9]{10})")),
    ("torchtitan", re.compile(r"step-([0-9]{1,18})")),
    ("accelerate", re.compile(r"checkpoint_([0-9]{1,18})")),
    ("deepspeed", rank_files.TAG),
    ("verl", re.compile(r"global_step_([0-9]{1,18})")),
)
_MINIMIND: Final = re.compile(r".+_resume\.pth")

SENTINEL: Final = "checkpoint-is-incomplete.txt"
"""Trainer's mark of a save that a signal started and that has not ended."""

STRIPPED: Final = "dcpconv-stripped.json"
"""Our mark of a step whose optimizer was deleted, or is being deleted."""

TRAINER_STATE: Final = "trainer_state.json"
_RNG = re.compile(r"rng_state_([0-9]{1,9})\.pth")
_RANDOM = re.compile(r"random_states_([0-9]{1,9})\.pkl")
_TRAIN_STATE = re.compile(r"train_state_([0-9]{5,9})\.json")
_DP_DEGREES = re.compile(rb'"(dp_replicate|dp_shard)": *([0-9]{1,7})')
_INDEXED = {
    "model.safetensors.index.json": "hf",
    "pytorch_model.bin.index.json": "torch",
}
_ADAPTERS: Final = frozenset({"adapter_model.safetensors", "adapter_model.bin"})
_NEVER_EMPTY = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".json", METADATA)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the files of a step say.

    Attributes:
        form: How the weights are stored, or ``None`` where no form of ours holds them.
        weights: Where they are, relative to the step; empty for the step itself.
        holds: Some of ``HELD``.
        problems: Why the step is not complete, one sentence each.
        is_stripped: Whether its optimizer was deleted on purpose.
    """

    form: Form | None
    weights: str
    holds: tuple[str, ...]
    problems: tuple[str, ...]
    is_stripped: bool = False


def layout_of(name: str) -> tuple[Layout, int] | None:
    """Whose step a directory of this name is, and its number.

    >>> layout_of("checkpoint-500"), layout_of("checkpoint-500.tmp")
    (('hf-trainer', 500), None)
    """
    for layout, pattern in _DIRECTORIES:
        match = pattern.fullmatch(name)
        if match:
            return layout, int(match.group(1))
    return None


def is_minimind_name(name: str) -> bool:
    """Whether a file of this name is a MiniMind resume file."""
    return _MINIMIND.fullmatch(name) is not None


def layout_by_contents(listing: Listing) -> Layout | None:
    """Whose step a directory of another name looks like."""
    files = listing.files
    if any(_TRAIN_STATE.fullmatch(name) for name in files):
        return "lingua"
    if TRAINER_STATE in files:
        return "hf-trainer"
    if any(_RANDOM.fullmatch(name) for name in files):
        return "accelerate"
    if rank_files.is_deepspeed(listing):
        return "deepspeed"
    if rank_files.is_verl(listing):
        return "verl"
    return "dcp" if METADATA in files else None


def judge(layout: Layout, listing: Listing) -> Judged:
    """What a step directory holds, and whether it is complete, as far as ends of files tell."""
    form, weights, holds, problems = _JUDGES[layout](listing)
    problems += [f"{name} is no regular file" for name in listing.odd]
    if listing.is_cut:
        problems.append(f"it holds more than {len(listing.files):,} files")
    for name, nbytes in listing.files.items():
        if nbytes == 0 and name.endswith(_NEVER_EMPTY):
            problems.append(f"{name} is empty")
        problems += glance(listing, name)
    metadata = f"{weights}/{METADATA}" if weights else METADATA
    if form is not None and (form != "dcp" or metadata in listing.files):
        holds.add("weights")
    if weights.rpartition("/")[2] in _ADAPTERS:
        holds = holds - {"weights"} | {"adapter"}
    held = tuple(name for name in HELD if name in holds)
    return Judged(form, weights, held, tuple(problems), is_stripped=STRIPPED in listing.files)


_Found = tuple[Form | None, str, set[str], list[str]]


def _hf_trainer(listing: Listing) -> _Found:
    files = listing.files
    problems: list[str] = []
    if SENTINEL in files:
        problems.append(f"{SENTINEL}: the save was interrupted")
    if TRAINER_STATE not in files:
        problems.append(f"no {TRAINER_STATE}: Trainer writes it last")
    elif not is_whole_json(listing, TRAINER_STATE):
        problems.append(f"{TRAINER_STATE} was cut short")
    form, weights = _weights(listing, problems)
    holds = {"trainer state"} if TRAINER_STATE in files else set()
    if STRIPPED in files:
        return form, weights, holds, problems
    deepspeed = bool(rank_files.tags(listing)) or rank_files.LATEST in files
    sharded = [name for name in listing.directories if name.startswith("optimizer_")]
    for name in sharded:
        problems += dcp_problems(listing, f"{name}/")[0]
    ranked = any(map(rank_files.OPTIMIZER_OF_RANK.fullmatch, files))
    if ranked:
        problems += _lost_ranks(listing, rank_files.OPTIMIZER_OF_RANK)
    has_optimizer = "optimizer.pt" in files or "optimizer.bin" in files or bool(sharded) or ranked
    if has_optimizer or deepspeed:
        holds.add("optimizer")
    if deepspeed:
        holds.add("weights")
        ranks = [int(found[1]) for name in files if (found := _RNG.fullmatch(name))]
        problems += rank_files.zero_problems(listing, ranks=max(ranks, default=-1) + 1)
    if "scheduler.pt" in files:
        holds.add("scheduler")
    if has_optimizer != ("scheduler.pt" in files) and not deepspeed:
        lacking = "scheduler.pt" if has_optimizer else "optimizer"
        problems.append(f"no {lacking}: Trainer would resume with neither optimizer nor scheduler")
    if "scaler.pt" in files:
        holds.add("scaler")
    _trainer_rng(listing, holds, problems)
    return form, weights, holds, problems


def _trainer_rng(listing: Listing, holds: set[str], problems: list[str]) -> None:
    # One process writes rng_state.pth, several write one with their rank each.
    if "rng_state.pth" in listing.files:
        holds.add("rng")
        return
    several = any(map(_RNG.fullmatch, listing.files))
    if several:
        holds.add("rng")
        at_least = max(2, ranks_that_saved(listing))
        _, missing = missing_ranks(listing, _RNG, at_least=at_least)
        problems += [f"rng_state_{rank}.pth is missing" for rank in missing]


def _weights(listing: Listing, problems: list[str]) -> tuple[Form | None, str]:
    """Where Trainer or accelerate put the weights; what keeps them from being whole is added."""
    files = listing.files
    if "model.safetensors" in files:
        return "hf", ""
    for index, form in _INDEXED.items():
        if index in files:
            problems += _missing_shard_files(listing, index)
            return ("hf", "") if form == "hf" else ("torch", "")
    if "pytorch_model.bin" in files:
        return "torch", "pytorch_model.bin"
    for name in sorted(listing.directories):
        if name.startswith("pytorch_model_fsdp"):
            problems += dcp_problems(listing, f"{name}/")[0]
            return "dcp", name
    for name in files:
        if name.rpartition("/")[2] in _ADAPTERS:
            return ("hf" if name.endswith("safetensors") else "torch"), name
    if "pytorch_model_fsdp.bin" in files:
        return "torch", "pytorch_model_fsdp.bin"
    if tags := rank_files.tags(listing):
        is_read = all(rank_files.is_read(listing, f"{tag}/") for tag in tags)
        return ("ranks" if is_read else None), ""
    if any(map(rank_files.MODEL_OF_RANK.fullmatch, files)):
        problems += _lost_ranks(listing, rank_files.MODEL_OF_RANK)
        return "ranks", ""
    problems.append("no weights: neither a model file nor an adapter nor an FSDP directory")
    return None, ""


def _lost_ranks(listing: Listing, pattern: re.Pattern[str]) -> list[str]:
    """Files of accelerate that ranks have not written."""
    some = next(name for name in listing.files if pattern.fullmatch(name))
    others = (_RNG, _RANDOM, rank_files.MODEL_OF_RANK, rank_files.OPTIMIZER_OF_RANK)
    found = (other.fullmatch(name) for name in listing.files for other in others)
    saved = max((int(match[1]) + 1 for match in found if match), default=0)
    _, lost = missing_ranks(listing, pattern, at_least=saved)
    return [f"{some[: some.rindex('_rank')]}_rank{rank}.bin is missing" for rank in lost]


def _missing_shard_files(listing: Listing, index: str) -> list[str]:
    try:
        names = {str(name) for name in json.loads(listing.read(index))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{index} cannot be read"]
    return [f"{name} is missing" for name in sorted(names) if name not in listing.files]


def _lingua(listing: Listing) -> _Found:
    problems, metadata = dcp_problems(listing)
    holds = {"optimizer"} if b"optim.state." in metadata else set()
    ranks = 1
    if "params.json" not in listing.files:
        problems.append("no params.json")
    else:
        ranks = _lingua_ranks(listing, problems)
    states = [name for name in listing.files if name.startswith("train_state_")]
    count, missing = missing_ranks(listing, _TRAIN_STATE, at_least=ranks)
    if count:
        holds |= {"scheduler", "trainer state"}
        problems += [f"train_state_{rank:05d}.json is missing" for rank in missing]
    else:
        problems.append("no train_state_00000.json: Lingua does not resume from it")
    problems += [f"{name} was cut short" for name in states if not is_whole_json(listing, name)]
    return "dcp", "", holds, problems


def _lingua_ranks(listing: Listing, problems: list[str]) -> int:
    """Data-parallel ranks of the run: each writes a train state."""
    params = listing.read("params.json")
    if not params.rstrip().endswith(b"}"):
        problems.append("params.json was cut short")
    ranks = 1
    for _, degree in set(_DP_DEGREES.findall(params)):
        ranks *= max(1, int(degree))
    return min(ranks, 1 << 20)


def _torchtitan(listing: Listing) -> _Found:
    if METADATA not in listing.files and any(n.endswith(".safetensors") for n in listing.files):
        problems: list[str] = []
        form, weights = _weights(listing, problems)
        return form, weights, set(), problems
    problems, metadata = dcp_problems(listing)
    return "dcp", "", _held_by_dcp(metadata), problems


def _accelerate(listing: Listing) -> _Found:
    files = listing.files
    problems: list[str] = []
    form, weights = _weights(listing, problems)
    holds: set[str] = set()
    if STRIPPED in files:
        return form, weights, holds, problems
    sharded = [name for name in listing.directories if name.startswith("optimizer_")]
    for name in sharded:
        problems += dcp_problems(listing, f"{name}/")[0]
    if sharded or "optimizer.bin" in files:
        holds.add("optimizer")
    holds |= {
        held
        for file, held in (("scheduler.bin", "scheduler"), ("scaler.pt", "scaler"))
        if file in files
    }
    at_least = max(1, ranks_that_saved(listing))
    count, missing = missing_ranks(listing, _RANDOM, at_least=at_least)
    if count:
        holds.add("rng")
    problems += [f"random_states_{rank}.pkl is missing" for rank in missing]
    return form, weights, holds, problems


def _deepspeed(listing: Listing) -> _Found:
    problems = rank_files.tag_problems(listing, "", ranks=0)
    form: Form | None = "ranks" if rank_files.is_read(listing, "") else None
    return form, "", {"weights", "optimizer"}, problems


def _verl(listing: Listing) -> _Found:
    files = listing.files
    only = {"model"} if STRIPPED in files else {"model", "optim", "extra_state"}
    there, problems = rank_files.verl_problems(listing, kinds=frozenset(only))
    megatron = [name for name in files if name.endswith(f"/dist_ckpt/{METADATA}")]
    if megatron and not there:  # its ranks write one DCP directory
        there, problems = {"model", "optim"}, []
    for name in megatron:
        problems += dcp_problems(listing, name.removesuffix(METADATA))[0]
    named = (("model", "weights"), ("optim", "optimizer"), ("extra_state", "rng"))
    holds = {held for kind, held in named if kind in there}
    holds |= {"scheduler"} if "extra_state" in there else set()
    holds |= {"trainer state"} if "data.pt" in files or "trainer_state.pt" in files else set()
    weights = rank_files.verl_weights(listing) if "model" in there else None
    if megatron and weights is None:
        return "dcp", megatron[0].rpartition("/")[0], holds, problems
    return (None, "", holds, problems) if weights is None else ("ranks", weights, holds, problems)


_IN_METADATA: Final = {
    "optimizer": (b"optim.state.", b"optimizer.state.", b".exp_avg"),
    "scheduler": (b"lr_scheduler", b"scheduler."),
    "scaler": (b"scaler.",),
    "rng": (b"rng_state", b"rng."),
    "trainer state": (b"train_state", b"trainer_state"),
}
"""Pieces of the keys under which trainers save what is not weights."""


def _held_by_dcp(metadata: bytes) -> set[str]:
    return {held for held, marks in _IN_METADATA.items() if any(mark in metadata for mark in marks)}


_JUDGES: Final[dict[Layout, Callable[[Listing], _Found]]] = {
    "hf-trainer": _hf_trainer,
    "lingua": _lingua,
    "torchtitan": _torchtitan,
    "accelerate": _accelerate,
    "deepspeed": _deepspeed,
    "verl": _verl,
    "dcp": _torchtitan,
}
