"""Loading the way torch does it: state dict, ``dcp.load``, and back, so that hooks are run.

What is decided, and the bytes, are those of the direct path; only the road is another: the tensors
that are filled are those of ``get_model_state_dict``, which hooks may have made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dcpconv.core.errors import DcpconvError
from dcpconv.loading.entries import fqn_of, set_state, state_of
from dcpconv.loading.materialise import materialise
from dcpconv.loading.model import places
from dcpconv.loading.moving import Arrived, agree_on_end
from dcpconv.loading.storage_reader import CheckpointReader
from dcpconv.loading.terms import Agreement, LoadRequest
from dcpconv.loading.world import World


def load_by_state_dict(
    model: nn.Module,
    agreement: Agreement,
    request: LoadRequest,
    world: World,
    *,
    jobs: int | None,
    init_missing: Callable[[str, Tensor], object] | None,
) -> Arrived:
    """Carry out an agreement that was made for a state dict.

    Args:
        model: The model.
        agreement: What to load.
        request: What the caller wants.
        world: The ranks.
        jobs: Threads.
        init_missing: Fills what the checkpoint cannot supply, before the state dict goes back.

    Raises:
        DcpconvError: A rank failed; the same on every rank.  Weights are undefined then.
    """
    failure: BaseException | None = None
    state: dict[str, Any] = {}
    wanted: dict[str, Tensor] = {}
    try:
        _materialise(model, agreement, request)
        state = state_of(model)
        wanted = {key: state[place.name] for place, key in agreement.account.chosen}
    except Exception as error:  # noqa: BLE001 - all ranks hear of it below
        failure = error
    world.agree(failure)
    supply = agreement.supplied.supply
    assert supply is not None  # noqa: S101 - every rank reads on this path
    reader = CheckpointReader.of(supply, jobs=jobs)
    with world.meeting():
        failure = _load(wanted, reader, world)
    if failure is None:
        try:
            if init_missing is not None and request.initialises:
                for place in agreement.missing():
                    init_missing(place.fqn, state[place.name])
            second = {name for place, _ in agreement.account.chosen for name in place.fqns[1:]}
            set_state(model, {k: v for k, v in state.items() if fqn_of(k) not in second})
        except Exception as error:  # noqa: BLE001 - all ranks hear of it below
            failure = error
    agree_on_end(world, failure)
    return Arrived(reader.nbytes_read, 0, reader.losses)


def _load(wanted: dict[str, Tensor], reader: CheckpointReader, world: World) -> Exception | None:
    """What went wrong on any rank; ``None`` where all is well."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            dcp_load(wanted, storage_reader=reader, process_group=world.group)
    except CheckpointException as error:
        # It is of no use as it is: torch's text does not say what happened.
        failed = next(iter(error.failures.values()))[0]
        reason = f"{type(failed).__name__}: {failed}".splitlines()[0]
        if isinstance(failed, DcpconvError):
            return failed
        return DcpconvError("torch could not load the state dict", [("reason", reason)])
    return None


def _materialise(model: nn.Module, agreement: Agreement, request: LoadRequest) -> None:
    """Give memory to all that is loaded; modules with hooks may make one tensor of several."""
    alone = {fault.key for fault in agreement.account.ignored}
    if not request.initialises:
        alone |= {fault.key for fault in agreement.account.missing}
    wanted = [
        place
        for place in places(model)
        if (place.is_parameter or place.is_persistent) and not alone & {*place.fqns}
    ]
    materialise(model, wanted, device=request.device, dtypes={})
