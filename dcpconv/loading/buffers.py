"""Buffers that no checkpoint has: RoPE tables and the like, which their module computes.

A model that was built on the meta device, or went through ``to_empty``, has garbage in them.
Modules that offer a way to compute them again are asked to; what cannot be shown to have been
written is reported, because it would surface as a NaN many steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcpconv.loading.model import flat_pieces, walk


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of the non-persistent buffers.

    Attributes:
        computed: FQNs of buffers that their module computed again.
        uninitialised: FQNs of buffers that were on the meta device and that nothing wrote.
    """

    computed: tuple[str, ...] = ()
    uninitialised: tuple[str, ...] = ()


def restore_buffers(model: nn.Module, device: torch.device) -> Restored:
    """Give every non-persistent buffer memory and have its module compute it.

    A module without parameters of its own is asked whether or not its buffers were on the meta
    device: ``to_empty`` leaves no trace, and computing a table twice does no harm.

    Args:
        model: Any model.
        device: Where buffers belong that are on the meta device.

    Source:
        Lingua calls ``rope_embeddings.reset_parameters()`` after loading
        (``apps/main/train.py`` at facebookresearch/lingua@437d680).  transformers 5.23 computes
        ``inv_freq`` in ``PreTrainedModel._init_weights``, 4.57 in the constructor, by
        ``rope_init_fn(config, device)``.
    """
    computed: list[str] = []
    left: list[str] = []
    seen: set[int] = set()
    flattened = {id(owner) for owner, _ in flat_pieces(model)}
    for prefix, module, initialise in _owners(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        names = _own(module)
        meta = [name for name in names if _buffer(module, name).is_meta]
        has_weights = any(not tensor.is_meta for tensor in module.parameters())
        # FSDP1 takes parameters away from modules that would initialise them all the same.
        has_own = any(True for _ in module.parameters()) or any(
            id(part) in flattened for part in module.modules()
        )
        if (not meta and has_own) or (has_weights and not _is_plain(module)):
            left.extend(prefix + name for name in meta)
            continue
        for name in meta:
            _materialise(module, name, device)
        before = {name: _state_of(_buffer(module, name)) for name in names}
        for way in _ways(module, initialise):
            with torch.no_grad(), _weights_aside(module) if has_weights else nullcontext():
                way()
            written = [name for name in names if _is_written(module, name, before[name])]
            if len(written) == len(names):
                break
        else:
            written = [name for name in names if _is_written(module, name, before[name])]
        computed.extend(prefix + name for name in written)
        left.extend(prefix + name for name in meta if name not in written)
    above = _computed_above(model, left) if left else ()
    return Restored((*computed, *above), tuple(name for name in left if name not in above))


def _is_plain(module: nn.Module) -> bool:
    """Whether all parameters are whole tensors of this process."""
    return all(type(tensor) is nn.Parameter for tensor in module.parameters())


@contextmanager
def _weights_aside(module: nn.Module) -> Iterator[None]:
    """Keeps what holds values out of reach of an initialisation: a tensor without memory is there
    instead.

    Source:
        transformers 5.23, ``GroundingDinoModel``: its ``level_embed`` is a ``torch.Tensor``, which
        has memory on the meta device, too.
    """
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in module.modules():
        passing = part._non_persistent_buffers_set  # noqa: SLF001
        both: tuple[Any, Any] = (part._parameters, part._buffers)  # noqa: SLF001
        for tensors in both:
            held += [
                (tensors, name, tensor)
                for name, tensor in tensors.items()
                if tensor is not None and not tensor.is_meta and name not in passing
            ]
    for tensors, name, tensor in held:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[name] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    try:
        yield
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor


def _computed_above(model: nn.Module, names: list[str]) -> tuple[str, ...]:
    """Buffers that the model around their module computes when it initialises itself.

    Asked only where it has no memory of its own yet: nothing that holds a value is written.

    Source:
        transformers 5.23, ``FalconH1PreTrainedModel._init_weights``: the model hands each layer its
        ``mup_vector``.
    """
    modules = dict(walk(model))
    before = {}
    around: set[str] = set()
    for name in names:
        prefix, _, buffer = name.rpartition(".")
        tensor = _buffer(modules[f"{prefix}." if prefix else ""], buffer)
        if not tensor.is_meta:
            before[name] = _state_of(tensor)
            around |= {prefix for prefix in modules if name.startswith(prefix)}
    for prefix in sorted(around, key=len, reverse=True):
        module = modules[prefix]
        hook = getattr(module, "_init_weights", None)
        if callable(hook) and all(tensor.is_meta for tensor in module.parameters()):
            with torch.no_grad():
                hook(module)
    return tuple(
        name
        for name, seen in before.items()
        if _is_written(
            modules[f"{prefix}." if (prefix := name.rpartition(".")[0]) else ""],
            name.rpartition(".")[2],
            seen,
        )
    )


def _owners(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], object] | None]]:
    """Modules with non-persistent buffers, and the ``_init_weights`` of the model around them."""
    hooks: dict[str, Callable[[nn.Module], object]] = {}
    for prefix, module in walk(model):
        hook = getattr(module, "_init_weights", None)
        if callable(hook):
            hooks[prefix] = hook
        if _own(module):
            around = [at for at in hooks if prefix.startswith(at)]
            yield prefix, module, hooks[max(around, key=len)] if around else None


def _own(module: nn.Module) -> list[str]:
    return [
        name
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if buffer is not None and name in module._non_persistent_buffers_set  # noqa: SLF001
    ]


def _buffer(module: nn.Module, name: str) -> Tensor:
    found: Tensor = getattr(module, name)
    return found


def _materialise(module: nn.Module, name: str, device: torch.device) -> None:
    empty = torch.empty_like(_buffer(module, name), device=device)
    if empty.is_floating_point() or empty.is_complex():
        empty.fill_(float("nan"))  # what is still there afterwards was never computed
    module._buffers[name] = empty  # noqa: SLF001


def _state_of(buffer: Tensor) -> tuple[int, int]:
    """Another where the buffer is another or was written; torch counts no writes to what was made
    in inference mode."""
    return id(buffer), 0 if buffer.is_inference() else buffer._version  # noqa: SLF001


def _is_written(module: nn.Module, name: str, before: tuple[int, int]) -> bool:
    buffer = _buffer(module, name)
    if buffer.is_meta or _state_of(buffer) == before:
        return False
    return not bool(buffer.isnan().any())


def _ways(
    module: nn.Module, initialise: Callable[[nn.Module], object] | None
) -> Iterator[Callable[[], object]]:
    """Ways to compute a module's buffers, the most specific first."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        yield reset
    if initialise is not None:
        hook = initialise
        yield lambda: hook(module)
    if callable(getattr(module, "rope_init_fn", None)) and hasattr(module, "inv_freq"):
        yield lambda: _rope(module)


def _rope(module: Any) -> None:
    table, module.attention_scaling = module.rope_init_fn(module.config, module.inv_freq.device)
    module.inv_freq.copy_(table)
    if isinstance(getattr(module, "original_inv_freq", None), Tensor):
        module.original_inv_freq = module.inv_freq
