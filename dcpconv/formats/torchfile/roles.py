"""Files that ``torch.save`` wrote beside a model: what they are is told by their names.

Source:
    transformers 5.23 ``trainer.py`` and ``trainer_pt_utils.py``; accelerate 1.12
    ``utils/constants.py``; verl 0.6 ``utils/checkpoint``; DeepSpeed 0.18 ``runtime/engine.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_BESIDE: Final = re.compile(
    r"(rng_state|random_states?|optimizer|optim|scheduler|lr_scheduler|scaler|sampler|dl_state_dict"
    r"|dataloader|train_state|training_args|custom_checkpoint|extra_state)"
    r"([_-]?\d+|[_-]world_size[_-].*|[_-]rank.*)?\.(pth|pt|bin|pkl)"
    r"|.*_optim_states\.pt",
    re.IGNORECASE,
)


def is_beside_a_model(path: Path) -> bool:
    """Whether a file holds random states, an optimizer, a schedule, arguments: no weights.

    >>> is_beside_a_model(Path("rng_state_0.pth")), is_beside_a_model(Path("model.pth"))
    (True, False)
    """
    return _BESIDE.fullmatch(path.name) is not None
