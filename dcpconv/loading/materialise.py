"""Memory for tensors on the meta device, and new dtypes, without breaking what holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dcpconv.loading.model import Place, device_of, home_of, walk
from dcpconv.loading.pages import use_huge_pages


def materialise(
    model: nn.Module,
    places: Sequence[Place],
    *,
    device: torch.device | None,
    dtypes: Mapping[str, torch.dtype],
    huge_pages: bool = False,
) -> None:
    """Give memory to every parameter and persistent buffer that has none, contents undefined.

    Nothing touches it here: pages come into being where the threads that read first write.

    ``Module.to_empty`` would also overwrite tensors that do have memory, and untie those that are
    tied by sharing a parameter.

    Args:
        model: Any model.
        places: Its tensors.
        device: Where to, where no mesh says it; by default ``home_of`` the model.
        dtypes: New dtypes by FQN, also for tensors that have memory; their contents are not kept.
        huge_pages: Ask for huge pages.
    """
    wanted: dict[int, tuple[torch.device, torch.dtype]] = {}
    keep: list[Tensor] = []  # an id is only good while its tensor lives
    offloaded, home = _offloaded(model), device or home_of(model)
    for place in places:
        tensor = place.tensor
        dtype = dtypes.get(place.fqn, tensor.dtype)
        if place.flat is None and (tensor.is_meta or dtype != tensor.dtype):
            keep.append(tensor)
            at = torch.device("cpu") if id(tensor) in offloaded else device_of(tensor, home)
            wanted[id(tensor)] = (at if tensor.is_meta else tensor.device, dtype)
    if not wanted:
        return
    made: dict[int, Tensor] = {}

    def renew(tensor: Tensor) -> Tensor:
        if id(tensor) not in wanted:
            return tensor
        if id(tensor) not in made:
            at, dtype = wanted[id(tensor)]
            made[id(tensor)] = torch.empty_like(tensor, device=at, dtype=dtype)
            if huge_pages:
                use_huge_pages(made[id(tensor)])
        return made[id(tensor)]

    model._apply(renew)  # type: ignore[no-untyped-call]  # noqa: SLF001
    owners = {
        prefix + name: module
        for prefix, module in walk(model)
        for name in module._parameters  # noqa: SLF001
    }
    for place in places:
        for fqn in place.fqns[1:]:
            if place.is_parameter and place.flat is None and fqn in owners:
                name = fqn.rpartition(".")[2]
                owners[fqn]._parameters[name] = getattr(place.module, place.name)  # noqa: SLF001


def _offloaded(model: nn.Module) -> set[int]:
    """Ids of the parameters that FSDP2 keeps on the CPU."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()  # noqa: SLF001
            # torch 2.13 has a list of groups, earlier versions at most one.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
            found.update(
                id(param.sharded_param)
                for group in groups
                if group is not None
                for param in group.fsdp_params
                if param.offload_to_cpu
            )
    return found
