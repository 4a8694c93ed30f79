"""The memory in which a live tensor's elements are, and why some have none to be filled."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dcpconv.core.errors import DcpconvError


def inner(tensor: Tensor) -> Tensor:
    """The tensor inside wrappers whose elements are its own, as they are.

    A wrapper that holds something else, codes and factors for instance, is returned itself.

    Source:
        torchao 0.18 ``float8/fsdp_utils.py``: ``WeightWithDynamicFloat8CastTensor`` wraps a weight
        so that FSDP2 gathers it in fp8.
    """
    while is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        names, _ = tensor.__tensor_flatten__()
        held = getattr(tensor, names[0]) if len(names) == 1 else None
        if held is None or held.shape != tensor.shape or held.dtype is not tensor.dtype:
            return tensor
        tensor = held
    return tensor


def trouble(tensor: Tensor) -> str:
    """Why nothing can be read into a parameter or buffer; empty where it can."""
    if is_lazy(tensor):
        return "has no shape before the module is called for the first time"
    local = inner(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)  # noqa: SLF001
    if is_traceable_wrapper_subclass(local):
        return f"{type(local).__name__} holds other elements than it shows"
    if local.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, and this is none"
    if any(n > 1 and stride == 0 for n, stride in zip(local.shape, local.stride(), strict=True)):
        return "elements share their memory"
    return ""


def require_fillable(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises where a tensor has no memory that can be filled.

    Args:
        tensors: With their FQNs.

    Raises:
        DcpconvError: All of them are listed.
    """
    wrong = [(fqn, why) for fqn, tensor in tensors if (why := trouble(tensor))]
    if wrong:
        raise DcpconvError(
            "parameters cannot be filled; nothing was loaded",
            [("fqn", f"{fqn}  {why}") for fqn, why in wrong],
            hint="load before quantize_() or expand(), and after the first call of lazy modules",
        )
