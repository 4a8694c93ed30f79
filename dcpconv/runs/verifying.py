"""Looks into every step as far as headers go, and further where asked: what a listing by names
cannot see.

Memory: one step's headers.  Tensors are read only to compare them with a fingerprint, and nothing
in a pickle is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpconv.core.catalog import Catalog
from dcpconv.engine.manifests import MANIFEST, manifest_beside
from dcpconv.engine.worlds.seats import RankError
from dcpconv.formats import dcp
from dcpconv.formats.opening import open_checkpoint
from dcpconv.plan.manifests import cover_manifest
from dcpconv.runs.entries import as_place
from dcpconv.runs.errors import in_one_line
from dcpconv.runs.finding import FoundStep, find_checkpoints
from dcpconv.runs.glance import emptied, glance, is_emptied
from dcpconv.runs.layouts import TRAINER_STATE
from dcpconv.runs.listing import LARGEST_TEXT, METADATA, Listing, list_step
from dcpconv.sources.opening import parameters_of
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import understand

if TYPE_CHECKING:
    from dcpconv.plan.readers import Readers


@dataclass(frozen=True, slots=True)
class StepCheck:
    """One step and everything that is wrong with it.

    Attributes:
        step: The step.
        problems: As far as headers tell, and contents where they were read; one sentence each.
        notes: What could not be compared.
    """

    step: FoundStep
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        is_complete = bool(self) and not self.step.is_stripped
        return {**self.step.to_json(), "complete": is_complete, "problems": list(self.problems)} | (
            {"notes": list(self.notes)} if self.notes else {}
        )


def verify_checkpoints(
    run_dir: str | os.PathLike[str], *, deep: bool = False, ranks: Readers | None = None
) -> Iterator[StepCheck]:
    """Every step of a run with its problems, one after the other.

    Args:
        run_dir: The run.
        deep: Read the weights, too, and compare them with the fingerprint beside them.
        ranks: The processes that read the weights together, each a share; all get the same.

    Raises:
        RankError: The ranks do not see the same, or one of them is gone; when a step is asked for.
        NotACheckpointError: ``run_dir`` is a file, or cannot be read.
    """
    return (verify_step(step, deep=deep, ranks=ranks) for step in find_checkpoints(run_dir))


def verified(step: FoundStep) -> FoundStep:
    """The step with all problems that its headers tell."""
    return replace(step, problems=verify_step(step).problems)


def verify_step(step: FoundStep, *, deep: bool = False, ranks: Readers | None = None) -> StepCheck:
    """Opens the weights and everything beside them; never raises what a file made it raise.

    Args:
        step: Where they are.
        deep: As for ``verify_checkpoints``.
        ranks: Likewise.

    Raises:
        RankError: The ranks do not see the same, or one of them is gone.
    """
    problems = list(step.problems)
    notes: list[str] = []
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
        if deep and step.form is not None and not problems:
            _compare_contents(step, problems, notes, ranks)
    except RankError:
        raise
    except Exception as error:  # noqa: BLE001  files of strangers; the other steps still count
        problems.append(f"it cannot be read ({in_one_line(error)})")
    return StepCheck(step, tuple(dict.fromkeys(problems)), tuple(notes))


def _compare_contents(
    step: FoundStep, problems: list[str], notes: list[str], ranks: Readers | None
) -> None:
    """Reads the weights and compares them with the manifest of the time when they were saved."""
    places = (manifest_beside(step.path), manifest_beside(step.weights))
    manifest = next((place for place in places if place.is_file()), None)
    if manifest is None:
        notes.append(f"no {MANIFEST} was written when it was saved: contents were not compared")
        return
    source = understand(step.weights, collects=True)
    coverage = cover_manifest(source, manifest, data=True, ranks=ranks)
    problems += [f"{label}: {text}" for label, text in coverage.facts()]


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
        return open_checkpoint(path, problems=found, parameters=parameters_of(path, Said()))
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
