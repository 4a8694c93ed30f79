"""For the tests of a training code: does this model still take that checkpoint?

>>> from dcpconv.core.catalog import TensorEntry
>>> from dcpconv.core.dtypes import BY_LABEL
>>> keys = {"norm.weight": TensorEntry("norm.weight", BY_LABEL["bf16"], (96,), ())}
>>> bool(assert_covers(keys, keys))
True

The keys are usually those of a model on the meta device; see ``examples/ci/test_weights.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcpconv.plan.coverage import Coverage
    from dcpconv.sources.opening import Openable


def assert_covers(
    model_or_keys: Openable,
    source: Openable,
    *,
    to: str | None = None,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    allow: Sequence[str] = (),
    dtypes: bool = False,
) -> Coverage:
    """Passes if ``source`` supplies exactly the keys and shapes of a model.

    Args:
        model_or_keys: A live model (the meta device is enough), a state_dict, a key list, or
            anything else that ``dcpconv.check`` takes as its target.
        source: A checkpoint of any form and naming, a hub id, or a key list.
        to: Naming of the model, where its keys leave a choice.
        from_: Naming of the source, where its keys leave a choice.
        keymap: A table of your own.
        assets: Directory with the source's config, where there is none beside it.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        allow: Features that may be lost, by name.
        dtypes: Element types must agree too.

    Returns:
        The account, for further questions.

    Raises:
        AssertionError: It does not fit; the message is the report with every reason.
    """
    # Imported late: every pytest run of an environment with dcpconv loads this package.
    from dcpconv.checking.check import check  # noqa: PLC0415
    from dcpconv.checking.reports import text  # noqa: PLC0415

    __tracebackhide__ = True  # pytest then shows the caller's line
    coverage = check(
        source,
        to=to,
        against=model_or_keys,
        from_=from_,
        keymap=keymap,
        assets=assets,
        spec=spec,
        allow=allow,
        dtypes=dtypes,
    )
    if not coverage:
        raise AssertionError(f"the checkpoint does not cover the model\n{text.render(coverage)}")
    return coverage
