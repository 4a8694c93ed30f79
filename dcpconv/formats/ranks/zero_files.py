"""What one file of a DeepSpeed checkpoint says; nothing of DeepSpeed is imported, nothing runs.

Source:
    deepspeed 0.19.8 ``runtime/engine.py`` (``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``,
    ``_common_checkpoint_state``), ``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py`` and
    ``runtime/bf16_optimizer.py`` (``state_dict``).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Identity
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.archive import (
    NAMES,
    Archive,
    StoredTensor,
    read_archive,
    read_tensors,
)
from dcpconv.formats.torchfile.stand_ins import Call, Instance, Ref, instances
from dcpconv.stores.local import OpenFile

MODEL_FILE: Final = re.compile(
    r"(?:zero_pp_rank_(?P<rank>\d{1,9})_)?mp_rank_(?P<mp>\d{1,9})_?model_states\.pt"
)
OPTIM_FILE: Final = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,9})_mp_rank_(?P<mp>\d{1,9})_?optim_states\.pt"
)
PARTIAL_FILE: Final = re.compile(r"(layer_|expert_|expp_rank_)\d+.*(model|optim)_states\.pt")
"""Files of pipeline stages and of experts, which these readers do not put together."""

ParameterShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A ``*_model_states.pt``.

    Attributes:
        file: Its path, relative to the catalog's.
        identity: What the file was when it was read.
        module: Tensors of ``state_dict()``, by key; ``None`` for one without data.
        groups: Shapes of the trained parameters, by parameter group, in the optimizer's order.
        frozen: Shapes of the parameters that no optimizer knows.
        fragments: This rank's share of these.
        shared: Key -> key of the parameter it is another name of.
        buffers: Keys that are no parameters.
        stage: ZeRO stage of the run, where the file says it.
        ranks: Data-parallel processes; 0 where the file does not say.
        model_ranks: Processes that share one copy of the model.
        step: Updates so far; -1 where the file does not say.
    """

    file: str
    identity: Identity
    module: Mapping[str, StoredTensor | None]
    groups: tuple[ParameterShapes, ...]
    frozen: ParameterShapes
    fragments: Mapping[str, StoredTensor]
    shared: Mapping[str, str]
    buffers: frozenset[str]
    stage: int | None
    ranks: int
    model_ranks: int
    step: int

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.identity[2]

    @property
    def is_split(self) -> bool:
        """Whether it is one rank's of stage 3: it has no parameter whole."""
        match = MODEL_FILE.fullmatch(Path(self.file).name)
        return match is not None and match["rank"] is not None


@dataclass(frozen=True, slots=True)
class OptimFile:
    """A ``*_optim_states.pt``.

    Attributes:
        file: Its path, relative to the catalog's.
        identity: What the file was when it was read.
        stage: ZeRO stage; 1 where the file does not say, as ``BF16_Optimizer`` writes it.
        counts: Ranks that share a parameter group, by group.
        groups: This rank's flat fp32 weights, by group.
        paddings: Elements that were cut off the end of each, by group.
        gaps: Elements between one parameter and the next, by group.
        state: Optimizer state by name, by group.
        param_groups: The groups' numbers and which of the flat weights are in them.
        step: Updates so far; ``None`` where no state says.
    """

    file: str
    identity: Identity
    stage: int
    counts: tuple[int, ...]
    groups: tuple[StoredTensor, ...]
    paddings: tuple[int, ...] | None
    gaps: tuple[tuple[int, ...], ...] | None
    state: Mapping[object, Mapping[str, object]]
    param_groups: tuple[Mapping[str, object], ...]
    step: float | None

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.identity[2]


class _Bystander:
    """An object of a class that means nothing to a reader of weights; it takes whatever comes."""

    def __init__(self, *_args: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def append(self, _item: object) -> None: ...

    def extend(self, _items: object) -> None: ...

    def add(self, _item: object) -> None: ...


class _Names(dict[tuple[str, str], Callable[..., object]]):
    """Every name has a stand-in: a trainer's own arguments and schedules do not keep a run's
    weights from being read.  Names of torch make tensors, so an unknown one is refused."""

    def get(self, key: tuple[str, str], default: object = None) -> object:  # type: ignore[override]
        found = super().get(key)
        if found is None and key[0].partition(".")[0] != "torch":
            return _Bystander
        return default if found is None else found


_STAGE: Final = ("deepspeed.runtime.zero.config", "ZeroStageEnum")
_NAMES: Final = _Names({**NAMES, _STAGE: instances(*_STAGE)})

_CODES: Final = {"float32": "f", "float64": "d", "float16": "e", "int64": "q", "int32": "i"}


def read_mapping(path: Path) -> tuple[dict[str, object], Identity]:
    """The mapping that a rank file holds, and what the file is.

    Raises:
        FormatError: The file is cut short, unsafe, or holds something else.
    """
    value, identity = read_value(path)
    if not isinstance(value, dict):
        raise FormatError("rank file holds no mapping", [("file", path)])
    return value, identity


def read_value(path: Path) -> tuple[object, Identity]:
    """What a file holds, with a ``StoredTensor`` in place of every tensor, and what it is.

    Raises:
        FormatError: The file is cut short or unsafe.
    """
    with _opened(path) as (archive, identity):
        return read_tensors(archive, names=_NAMES)[0], identity


def read_pickle(path: Path) -> tuple[bytes, Identity]:
    """The pickle of a file, unread, and what the file is.

    Raises:
        FormatError: The file is cut short.
    """
    with _opened(path) as (archive, identity):
        return archive.read("data.pkl"), identity


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Archive, Identity]]:
    try:
        file = OpenFile(path)
    except OSError as error:
        raise FormatError(
            "file cannot be read", [("file", path), ("reason", error.strerror)]
        ) from error
    with file:
        yield read_archive(file.read, file.nbytes, str(path), expect=file.expect), file.identity


def read_model_file(path: Path, file: str) -> ModelFile:
    """What a ``*_model_states.pt`` says.

    Raises:
        FormatError: It is damaged, or of a kind of parallelism that is not read.
    """
    value, identity = read_mapping(path)
    module = value.get("module")
    if not isinstance(module, dict):
        raise FormatError(
            "model file holds no state_dict",
            [("file", path), ("expected", "module"), ("found", type(module).__name__)],
            hint="pipeline-parallel checkpoints are not read; export one with DeepSpeed itself",
        )
    settings = _mapping(_mapping(value.get("ds_config")).get("zero_optimization"))
    stage = settings.get("stage")
    return ModelFile(
        file=file,
        identity=identity,
        module={
            str(key): tensor if isinstance(tensor, StoredTensor) else None
            for key, tensor in module.items()
            if not str(key).endswith("_extra_state")
        },
        groups=tuple(_shapes(path, group) for group in _list(value.get("param_shapes"))),
        frozen=_shapes(path, value.get("frozen_param_shapes")),
        fragments={
            str(key): tensor
            for key, tensor in _mapping(value.get("frozen_param_fragments")).items()
            if isinstance(tensor, StoredTensor)
        },
        shared={str(key): str(owner) for key, owner in _pairs(value.get("shared_params"))},
        buffers=frozenset(map(str, _list(value.get("buffer_names")))),
        stage=stage if isinstance(stage, int) else None,
        ranks=_count(value.get("dp_world_size"), 0),
        model_ranks=_count(value.get("mp_world_size"), 1),
        step=_count(value.get("global_steps"), -1),
    )


def read_optim_file(path: Path, file: str) -> OptimFile:
    """What a ``*_optim_states.pt`` says.

    Raises:
        FormatError: It is damaged, or holds no partition of a ZeRO optimizer.
    """
    value, identity = read_mapping(path)
    outer = _mapping(value.get("optimizer_state_dict"))
    key = "fp32_flat_groups" if "fp32_flat_groups" in outer else "single_partition_of_fp32_groups"
    flat = _list(outer.get(key))
    groups = [tensor for tensor in flat if isinstance(tensor, StoredTensor)]
    if not groups or len(groups) < len(flat):
        raise FormatError(
            "optimizer file holds no flat fp32 weights",
            [
                ("file", path),
                ("expected", "a list of tensors"),
                ("found", f"{len(groups)} of them"),
            ],
        )
    odd = [n for n, group in enumerate(groups) if len(group.shape) != 1 or not group.is_contiguous]
    if odd or len({group.dtype for group in groups}) > 1:
        raise FormatError(
            "flat weights are no vectors of one type",
            [("file", path), *(("group", f"{n}, shape {list(groups[n].shape)}") for n in odd)],
        )
    inner = outer.get("optimizer_state_dict", outer.get("base_optimizer_state"))
    state, param_groups = _optimizer(inner)
    counts = outer.get("partition_count")
    paddings, gaps = outer.get("group_paddings"), outer.get("param_alignment_paddings")
    return OptimFile(
        file=file,
        identity=identity,
        stage=_stage(outer.get("zero_stage"), 3 if key == "fp32_flat_groups" else 1),
        counts=tuple(_count(n, 0) for n in (counts if isinstance(counts, list) else [counts])),
        groups=tuple(groups),
        paddings=tuple(_count(n, 0) for n in paddings) if isinstance(paddings, list) else None,
        gaps=tuple(tuple(_count(n, 0) for n in _list(g)) for g in gaps)
        if isinstance(gaps, list)
        else None,
        state=state,
        param_groups=param_groups,
        step=_step(path, state, param_groups),
    )


def step_of(path: Path, optimizer: object) -> float | None:
    """Updates that an optimizer's ``state_dict()`` counts; ``None`` where it does not."""
    return _step(path, *_optimizer(optimizer))


def _optimizer(
    inner: object,
) -> tuple[Mapping[object, Mapping[str, object]], tuple[Mapping[str, object], ...]]:
    """State and groups; an elastic checkpoint has a list of states and no groups."""
    if isinstance(inner, list):
        return {n: _mapping(found) for n, found in enumerate(inner)}, ()
    found = _mapping(inner)
    state = {key: _mapping(item) for key, item in _pairs(found.get("state"))}
    return state, tuple(_mapping(group) for group in _list(found.get("param_groups")))


def _step(
    path: Path,
    state: Mapping[object, Mapping[str, object]],
    param_groups: tuple[Mapping[str, object], ...],
) -> float | None:
    """Updates that the optimizer made: a number, or a tensor of one element."""
    for found in (*state.values(), *param_groups):
        step = found.get("step")
        if isinstance(step, (int, float)):
            return float(step)
        if isinstance(step, StoredTensor) and step.dtype.name in _CODES and step.nbytes:
            with OpenFile(path) as file:
                data = file.read(step.offset, step.dtype.itemsize)
            return float(struct.unpack(f"<{_CODES[step.dtype.name]}", data)[0])
    return None


def _stage(value: object, default: int) -> int:
    number = value.args[0] if isinstance(value, Instance) and len(value.args) == 1 else value
    return number if type(number) is int else default


def _shapes(path: Path, value: object) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in _pairs(value):
        sizes = shape.args[0] if isinstance(shape, Call) and shape.func == _SIZE else shape
        if not isinstance(sizes, (tuple, list)) or not all(
            type(n) is int and n >= 0 for n in sizes
        ):
            raise FormatError(
                "parameter has no sensible shape",
                [("file", path), ("key", key), ("found", repr(sizes)[:80])],
            )
        found[str(key)] = tuple(sizes)
    return found


_SIZE: Final = Ref("torch", "Size")


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _pairs(value: object) -> list[tuple[object, object]]:
    if isinstance(value, dict):
        return [*value.items()]
    return [tuple(pair) for pair in _list(value) if isinstance(pair, list) and len(pair) == 2]


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _count(value: object, default: int) -> int:
    return value if type(value) is int and value >= 0 else default
