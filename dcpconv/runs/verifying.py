"""Looks into every step as far as headers go: what a listing by names cannot see.

Memory: one step's headers.  No tensor is read, and nothing in a pickle is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcpconv.core.catalog import Catalog
from dcpconv.formats import dcp
from dcpconv.formats.opening import open_checkpoint
from dcpconv.runs.entries import as_place
from dcpconv.runs.errors import in_one_line
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.glance import emptied, glance, is_emptied
from dcpconv.runs.layouts import TRAINER_STATE
from dcpconv.runs.listing import LARGEST_TEXT, METADATA, Listing, list_step


@dataclass(frozen=True, slots=True)
class StepCheck:
    """One step and everything that is wrong with it, as far as headers tell."""

    step: FoundStep
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        is_complete = bool(self) and not self.step.is_stripped
        return {**self.step.to_json(), "complete": is_complete, "problems": list(self.problems)}


def verify_checkpoints(run_dir: str | os.PathLike[str]) -> Iterator[StepCheck]:
    """Every step of a run with its problems, one after the other.

    Raises:
        NotACheckpointError: ``run_dir`` is a file, or cannot be read.
    """
    return map(verify_step, find_checkpoints(run_dir))


def verified(step: FoundStep) -> FoundStep:
    """The step with all problems that its headers tell."""
    return replace(step, problems=verify_step(step).problems)


def verify_step(step: FoundStep) -> StepCheck:
    """Opens the weights and everything beside them; never raises what a file made it raise."""
    problems = list(step.problems)
    try:
        if step.form is not None and not problems:
            problems += _weights_problems(step)
        if step.path.is_dir():
            listing = list_step(as_place(step.path))
            for name in sorted(listing.files):
                problems += _file_problems(listing, name, step)
            for directory in sorted(listing.directories):
                path = step.path / directory
                # Of an optimizer that is being deleted nothing is asked.
                is_going = step.is_stripped and directory.startswith("optimizer_")
                if dcp.is_dcp(path) and path != step.weights and not is_going:
                    problems += [f"{directory}: {why}" for why in _opening_problems(path)]
    except Exception as error:  # noqa: BLE001  files of strangers; the other steps still count
        problems.append(f"it cannot be read ({in_one_line(error)})")
    return StepCheck(step, tuple(dict.fromkeys(problems)))


def _weights_problems(step: FoundStep) -> list[str]:
    found: list[str] = []
    catalog = _open(step.weights, found)
    if catalog is not None and not found and step.form != "dcp":
        empty = [key for key, entry in catalog.tensors.items() if is_emptied(key, entry.shape)]
        found += emptied(empty)
    return found


def _opening_problems(path: Path) -> list[str]:
    found: list[str] = []
    _open(path, found)
    return found


def _open(path: Path, found: list[str]) -> Catalog | None:
    metadata = path / METADATA
    if metadata.is_file() and metadata.stat().st_size > LARGEST_TEXT:
        found.append(f"{METADATA} is larger than {LARGEST_TEXT:,} bytes")
        return None
    try:
        return open_checkpoint(path, problems=found)
    except Exception as error:  # noqa: BLE001  files of strangers
        found.append(in_one_line(error))
        return None


def _file_problems(listing: Listing, name: str, step: FoundStep) -> Iterator[str]:
    nbytes = listing.files[name]
    if name.endswith(".json") and 0 < nbytes <= LARGEST_TEXT:
        try:
            values = json.loads(listing.read(name))
        except (ValueError, RecursionError) as error:
            yield f"{name}: is not JSON ({str(error)[:200]})"
            return
        number = values.get("global_step") if isinstance(values, dict) else None
        is_own = name == TRAINER_STATE and not step.is_link  # a link may have any number
        if is_own and step.step is not None and number != step.step:
            said = str(number)[:40]
            yield f"{name}: says global_step {said}, but the directory is step {step.step}"
    else:
        yield from glance(listing, name, strict=True)
