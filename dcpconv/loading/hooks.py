"""Whether a model changes what goes in and out of its state dict: the direct path would not know.

Source: torch 2.13 ``nn/modules/module.py`` (``_state_dict_hooks`` and the others); hooks are kept
bare, as ``functools.partial`` or inside ``_WrappedHook``.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from torch import nn

_HOOKS: Final = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_METHODS: Final = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")

_KNOWN: Final = frozenset({"torch", "torchao"})
"""Packages whose hooks and methods leave the values of tensors alone, or are seen through: FSDP,
DDP, activation checkpointing, ``torch.compile``, quantization, batch norms' counters."""


def own_state_dict(model: nn.Module) -> str:
    """The first module with a state dict of its own making and how; empty where there is none.

    >>> own_state_dict(nn.Linear(2, 3))
    ''
    """
    for name, module in model.named_modules():
        where = f"{type(module).__name__}{f' ({name})' if name else ''}"
        for kind in _HOOKS:
            for hook in getattr(module, kind, {}).values():
                if _package(hook) not in _KNOWN:
                    return f"{where} has {kind[1:].replace('_', ' ')}"
        for method in _METHODS:
            if method in vars(module) or _package(getattr(type(module), method)) not in _KNOWN:
                return f"{where} overrides {method}"
    return ""


def _package(function: Any) -> str:
    """Where a hook comes from: the package of the function inside all wrappers."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        elif hasattr(function, "hook"):
            function = function.hook
        else:
            break
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).partition(".")[0]
