"""A training run goes on in a live model and its optimizer, whoever saved it and however sharded.

``load_training_state`` is ``load_init_weights`` for a checkpoint that has optimizer state, too: the
moments of a parameter are found by its name, relabelled as it is, and each rank reads those of its
own shards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dcpconv.core.catalog import TensorEntry
from dcpconv.loading.agreement import agree
from dcpconv.loading.catalogs import Opened
from dcpconv.loading.hooks import own_state_dict
from dcpconv.loading.model import Place
from dcpconv.loading.moving import move
from dcpconv.loading.optimizer_places import Room, StateNeed, kinds_of, params_by_fqn, state_needs
from dcpconv.loading.report import LoadReport
from dcpconv.loading.reporting import report_of
from dcpconv.loading.supply import Options
from dcpconv.loading.terms import (
    Addition,
    Agreement,
    LoadRequest,
    ReadMode,
    require_module,
    require_one_of,
)
from dcpconv.loading.world import World
from dcpconv.plan.coverage import Fault, Target
from dcpconv.plan.training.moments import moment_targets, regrouped
from dcpconv.plan.training.reading import read_training_state
from dcpconv.plan.training.state import Group, TrainingState, holds_tensor, read_scalar
from dcpconv.sources.understanding import Source

__all__ = ["TrainingReport", "load_training_state"]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What ``load_training_state`` did.

    Attributes:
        weights: What became of the weights; its bytes are those of weights and optimizer state.
        kind: Whose checkpoint it is: ``dcp``, ``minimind``, ``hf-trainer``, ``deepspeed``, ...
        state: ``(FQN, kinds)`` of the optimizer state that was loaded on this rank.
        groups: Numbers that the optimizer's parameter groups took from the checkpoint, by group.
        beside: Everything else in it that holds no tensor: ``step``, ``epoch``, ``scheduler``.
    """

    weights: LoadReport
    kind: str
    state: tuple[tuple[str, tuple[str, ...]], ...]
    groups: tuple[Mapping[str, object], ...]
    beside: Mapping[str, object]

    def __str__(self) -> str:
        kinds = dict.fromkeys(kind for _, found in self.state for kind in found)
        row = f"{', '.join(kinds) or 'none'} of {len(self.state)} parameters"
        rest = ", ".join(self.beside) or "nothing"
        return f"{self.weights}\n{'optimizer':<10} {row}\n{'beside':<10} {rest}"


@torch.no_grad()
def load_training_state(
    model: nn.Module,
    optimizer: Optimizer,
    source: str | os.PathLike[str],
    *,
    to: str | None = None,
    from_: str | None = None,
    assets: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, str] | None = None,
    strict: bool = True,
    process_group: Any = None,
    read: ReadMode = "auto",
    device: torch.device | str | None = None,
    jobs: int | None = None,
) -> TrainingReport:
    """Loads weights and optimizer state of a training run, by name, each rank its own shards.

    Call it on every rank, after the model is wrapped, sharded or parallelised and the optimizer is
    built.  Before anything changes, all ranks agree that weights and state fit: either all load, or
    all raise the same error.  The optimizer's groups take the numbers of the checkpoint (``lr``,
    ``betas``, ...); state that it has not made yet gets memory.

    Args:
        model: As for ``load_init_weights``.
        optimizer: Any whose state has the shape of its parameters; of torch's Adam, AdamW and SGD
            it is checked that nothing they need is missing.
        source: Whatever ``dcpconv runs carry`` reads: a DCP with weights and optimizer, MiniMind's
            ``*_resume.pth``, Hugging Face's ``checkpoint-N``, the files of all ranks of DeepSpeed,
            FSDP or verl, ``torch_checkpointing``.
        to: Naming of the model; by default as for ``load_init_weights``.
        from_: Naming of the source, where its keys leave a choice.
        assets: Directory with the config, where the source has none.
        sizes: Numbers of the model that no file states (``n_heads``).
        strict: Raise where a parameter of the optimizer has no state in the checkpoint, or state
            belongs to no rank's parameter.  Otherwise such a parameter starts without any.
        process_group: The ranks that load together; all by default.
        read: Which ranks read; as for ``load_init_weights``, without ``rank0``.
        device: Where tensors on the meta device go that are no DTensors; by default where the
            model's DTensors are, else its tensors with memory, else the CPU.
        jobs: Threads.

    Raises:
        CoverageError: Weights or state do not fit; lists everything, the same on every rank.
        OptimizerError: The optimizer's state cannot be told apart.
        FormatError: A file is truncated, malformed or unsafe, on this rank or another.
        LostRankError: A rank has died or hangs.
    """
    require_module(model)
    require_one_of("read", read, "auto", "all", "host", "once")
    world = World.of(process_group, load=os.fspath(source))
    world.require_same({"to": to, "from_": from_, "strict": strict, "read": read})
    hooks = own_state_dict(model)

    def opened(path: Path) -> Opened[Source]:
        state = read_training_state(path, from_=from_, assets=assets, sizes=sizes)
        return _opened(state)

    request = LoadRequest(
        source=source,
        options=Options(to=to, from_=from_),
        strict=strict,
        keeps_dtype=True,
        ignore=(),
        initialises=False,
        read=read,
        device=torch.device(device) if device is not None else None,
        opener=opened,
    )
    loading = _Loading(optimizer, strict=strict)
    agreement = agree(model, request, world, add=loading.add)
    arrived = move(
        model, agreement, request, world, jobs=jobs, progress=None, prepare=loading.make_room
    )
    loading.set_groups()
    notes = (f"{hooks}; state dict hooks are not run",) if hooks else ()
    weights = report_of(agreement, arrived, ())
    return TrainingReport(
        replace(weights, notes=(*weights.notes, *notes)),
        loading.kind,
        tuple((fqn, tuple(kinds)) for fqn, kinds in loading.kinds.items()),
        tuple(loading.values),
        loading.beside,
    )


def _opened(state: TrainingState) -> Opened[Source]:
    """A run's weights as a source, with extents relative to the run's root, and the run."""
    catalog = replace(state.model.catalog, path=state.root, identities=state.identities)
    weights = replace(state.model.weights, catalog=catalog)
    model = replace(state.model, catalog=catalog, weights=weights)
    groups = tuple(
        Group({name: _number(state.root, value) for name, value in g.values.items()}, g.params)
        for g in state.groups
    )
    beside = {name: value for name, value in state.beside.items() if not holds_tensor(value)}
    state = replace(state, model=model, groups=groups, beside=beside)
    entries = tuple(
        entry
        for kinds in state.moments.values()
        for entry in kinds.values()
        if isinstance(entry, TensorEntry)
    )
    return Opened(model, state, entries)


def _number(root: Path, value: object) -> object:
    """A learning rate that was stored as a tensor, as the number that it is."""
    return read_scalar(root, value) if isinstance(value, TensorEntry) else value


class _Loading:
    """What is known of the optimizer between agreeing and moving.

    Args:
        optimizer: The optimizer.
        strict: Whether a parameter without state is a fault.
    """

    def __init__(self, optimizer: Optimizer, *, strict: bool) -> None:
        self._optimizer = optimizer
        self._strict = strict
        self._rooms: dict[int, tuple[Place, Tensor, dict[str, Room]]] = {}
        self._group_of = {
            id(param): group for group in optimizer.param_groups for param in group["params"]
        }
        self.kind = ""
        self.kinds: dict[str, list[str]] = {}
        self.values: list[Mapping[str, object]] = []
        self.beside: Mapping[str, object] = {}

    def add(self, agreement: Agreement, told: object) -> Addition:
        """The optimizer's state as something to load beside the weights."""
        if not isinstance(told, TrainingState):
            raise TypeError(f"{type(told).__name__} is no training state")
        supply = agreement.supplied.supply
        state = replace(told, root=supply.catalog.path)
        self.kind, self.beside = state.kind, state.beside
        found: dict[str, dict[str, Target]] = {}
        for key, kind, target in moment_targets(state, supply.coverage):
            found.setdefault(supply.root + key, {})[kind] = target
        names = {place.fqn: key for place, key in agreement.account.chosen}
        params = params_by_fqn(self._optimizer, [place for place, _ in agreement.account.chosen])
        faults: list[Fault] = []
        needs: list[StateNeed] = []
        targets: dict[str, Target] = {}
        of_param: dict[int, str] = {}
        for fqn, (place, param) in params.items():
            of_param.setdefault(id(param), names[fqn])
            stored = found.get(names[fqn], {})
            if not stored and self._strict:
                faults.append(Fault(fqn, "has no state in the checkpoint"))
            faults += self._unlike(fqn, param, stored)
            for kind, target in stored.items():
                key = f"{names[fqn]} {kind}"
                targets[key] = replace(target, key=key)
                needs.extend(state_needs(place, key, targets[key], self._room(place, param, kind)))
                self.kinds.setdefault(fqn, []).append(kind)
        groups = regrouped(state, supply.coverage)
        by_key = {supply.root + k: group.values for group in groups for k in group.params}
        faults += self._group_values(by_key, of_param)
        idle = frozenset({*found} - {names[fqn] for fqn in params})
        return Addition(tuple(needs), targets, tuple(faults), idle, tuple(sorted(found)))

    def make_room(self) -> None:
        """Memory for all state, once the model has its own."""
        new: dict[int, Tensor] = {}
        for place, param, rooms in self._rooms.values():
            current = param
            if param.is_meta:
                # The model has another tensor by now, with memory.
                current = new[id(param)] = place.module.get_parameter(place.name)
            for room in rooms.values():
                state = self._optimizer.state[current]
                room.make(current, state, is_flat=place.flat is not None)
        for group in self._optimizer.param_groups if new else ():
            group["params"] = [new.get(id(param), param) for param in group["params"]]

    def set_groups(self) -> None:
        """Give the optimizer's groups the numbers of the checkpoint."""
        for group, values in zip(self._optimizer.param_groups, self.values, strict=True):
            for name, value in values.items():
                had = group.get(name)
                group[name] = tuple(value) if isinstance(value, list) else value
                if isinstance(had, Tensor):
                    had.fill_(float(str(value)))  # capturable optimizers keep it on the device
                    group[name] = had

    def _room(self, place: Place, param: Tensor, kind: str) -> Room:
        """One for all parts that FSDP1's flat parameter has."""
        _, _, rooms = self._rooms.setdefault(id(param), (place, param, {}))
        return rooms.setdefault(kind, Room(self._group_of[id(param)], kind))

    def _unlike(self, fqn: str, param: Tensor, stored: Mapping[str, Target]) -> list[Fault]:
        wanted = kinds_of(self._optimizer, self._group_of[id(param)])
        if wanted is None or not stored:
            return []
        name = type(self._optimizer).__name__
        lacking = [f"lacks {kind}, which {name} keeps" for kind in sorted(wanted - {*stored})]
        strange = [f"has {kind}, which {name} does not keep" for kind in sorted({*stored} - wanted)]
        return [Fault(fqn, "; ".join([*lacking, *strange]))] if lacking or strange else []

    def _group_values(
        self, by_key: Mapping[str, Mapping[str, object]], of_param: Mapping[int, str]
    ) -> list[Fault]:
        """Numbers for every group; its parameters must have been trained alike."""
        faults: list[Fault] = []
        self.values = []
        for number, group in enumerate(self._optimizer.param_groups):
            keys = [of_param[id(p)] for p in group["params"] if id(p) in of_param]
            known = [(key, by_key[key]) for key in keys if key in by_key]
            self.values.append(known[0][1] if known else {})
            for key, values in known:
                differs = sorted(n for n, v in values.items() if v != known[0][1].get(n))
                if differs:
                    why = f"{', '.join(differs)} differ from those of {known[0][0]}"
                    faults.append(Fault(key, f"{why}, which is in group {number}, too"))
        return faults
