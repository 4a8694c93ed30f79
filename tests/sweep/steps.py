"""What is proved of one architecture, step by step; every step says ``ok`` or what went wrong."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dcpconv import check, convert, load_init_weights
from dcpconv.core.errors import DcpconvError
from dcpconv.families.configs import find_config
from dcpconv.families.keymaps import keymaps
from support.models.layers import randomise
from sweep import STEPS
from sweep.building import Architecture, build, class_of

Results = dict[str, str]

OK = "ok"


class FailedError(AssertionError):
    """A step that did not give what it promises."""


def prove(one: Architecture, work: Path, only: Container[str] = STEPS) -> Results:
    """Every step for one architecture, or ``only`` some; ``work`` is an empty directory.

    Raises:
        CannotBuildError: There is no such tiny model.
    """
    model = randomised(build(one))
    origin = work / "origin"
    model.save_pretrained(origin)
    kind = type(model)
    reference = kind.from_pretrained(origin).eval()
    results = {"parameters": str(sum(p.numel() for p in model.parameters()))}
    steps: dict[str, Callable[[], str]] = {
        "reference": lambda: as_saved(model, reference),
        "dcp": lambda: there_and_back(origin, work / "dcp", "dcp", reference),
        "torch": lambda: there_and_back(origin, work / "torch", "torch", reference),
        "files": lambda: holds(check(origin), "check of the files alone"),
        "check": lambda: holds(check(origin, against=reference), "check against the class"),
        "live": lambda: load_into(other(reference), origin, model),
        "meta": lambda: load_into(on_meta(reference), origin, model),
        "memory": lambda: from_memory(model, work / "memory", other(reference)),
        "base": lambda: into_base(one, origin),
        "damage": lambda: damage(origin, work / "damaged", reference),
        "namings": lambda: namings(one, origin, work / "namings", reference),
    }
    for name, step in steps.items():
        if name not in only:
            continue
        try:
            results[name] = step()
        except FailedError as error:
            results[name] = f"wrong: {error}"
        except DcpconvError as error:
            results[name] = f"{type(error).__name__}: {brief(error)}"
        except Exception as error:  # noqa: BLE001 - the sweep goes on
            results[name] = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            for place in ("dcp", "torch", "memory", "damaged", "namings"):
                shutil.rmtree(work / place, ignore_errors=True)
    return without_reference(results)


def without_reference(results: Results) -> Results:
    """Where transformers does not load what it has saved, there is nothing to compare with."""
    reason = results.get("reference", "")
    if not reason.startswith("skipped"):
        return results
    return {
        step: f"{reason}; then {found}" if step in STEPS and _is_wrong(found) else found
        for step, found in results.items()
    }


def _is_wrong(found: str) -> bool:
    return found.startswith("wrong") or found.partition(":")[0].endswith("Error")


def brief(error: DcpconvError) -> str:
    """A refusal in one line."""
    facts = "; ".join(f"{label} {value}" for label, value in error.facts[:6])
    return f"{error.headline} ({facts})"[:400]


def randomised(model: Any) -> Any:
    """Every stored tensor with values of its own, so that no two can be mistaken."""
    randomise(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            is_buffer = key not in dict(model.named_parameters())
            if is_buffer and tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor.dtype) / 8)
    return model


def other(model: Any) -> Any:
    """The same class with other values."""
    torch.manual_seed(99)
    return type(model)(copy.deepcopy(model.config)).eval()


def on_meta(model: Any) -> Any:
    """The same class without memory, as trainers build it."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()


def state_of(model: Any) -> dict[str, Tensor]:
    """Every parameter and buffer, those that are not stored too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same_state(found: Any, expected: Any) -> str:
    """All parameters and buffers bit for bit, and so the outputs."""
    have, want = state_of(found), state_of(expected)
    if have.keys() != want.keys():
        raise FailedError(f"other tensors: {sorted(have.keys() ^ want.keys())[:4]}")
    unlike = [key for key, tensor in want.items() if not same_bits(have[key], tensor)]
    if unlike:
        raise FailedError(f"{len(unlike)} tensors differ: {unlike[:4]}")
    return OK


def as_saved(model: Any, reference: Any) -> str:
    """What ``from_pretrained`` by itself makes of the files; nothing of ours takes part in it."""
    try:
        return same_state(model, reference)
    except FailedError as error:
        return f"skipped: transformers itself changes values ({error})"


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return False
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return torch.equal(
        one.detach().contiguous().reshape(-1).view(torch.uint8),
        other.detach().contiguous().reshape(-1).view(torch.uint8),
    )


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def there_and_back(origin: Path, work: Path, form: Any, reference: Any) -> str:
    """hf -> form -> hf: the same bits, and the same model from them."""
    there = work / ("there.pth" if form == "torch" else "there")
    convert(origin, there, form=form)
    convert(there, work / "back", form="hf", assets=origin if form == "torch" else None)
    want, have = tensors_of(origin), tensors_of(work / "back")
    if want.keys() != have.keys():
        raise FailedError(f"other keys: {sorted(want.keys() ^ have.keys())[:4]}")
    unlike = [key for key, tensor in want.items() if not same_bits(have[key], tensor)]
    if unlike:
        raise FailedError(f"other bits: {unlike[:4]}")
    if form != "dcp":
        return OK
    return same_state(type(reference).from_pretrained(work / "back"), reference)


def holds(coverage: Any, what: str) -> str:
    """A check that says yes."""
    if not coverage:
        raise FailedError(f"{what}: {coverage.counts()}: {list(coverage.facts())[:4]}")
    return OK


def load_into(model: Any, origin: Path, reference: Any) -> str:
    """A live model of the class, loaded: every tensor and, where one can be run, the outputs."""
    load_init_weights(model, origin)
    same_state(model, reference)
    outputs = outputs_of(model)
    if outputs is None:
        return OK
    if not same_outputs(outputs, outputs_of(reference)):
        raise FailedError("other outputs")
    return f"{OK}, outputs"


def from_memory(model: Any, work: Path, fresh: Any) -> str:
    """A checkpoint of a trainer, which spells keys as in memory, loads as well."""
    work.mkdir()
    torch.save(model.state_dict(), work / "model.pth")
    load_init_weights(fresh, work / "model.pth")
    return same_state(fresh, model)


def into_base(one: Architecture, origin: Path) -> str:
    """The class without a head takes what is its own of the files, as from_pretrained does."""
    if not one.base or one.base == one.model:
        return "skipped: it has no head"
    base = class_of(one.base)
    try:
        expected = base.from_pretrained(origin).eval()
    except Exception as error:  # noqa: BLE001
        return f"skipped: transformers itself cannot ({type(error).__name__})"
    own = set(base(copy.deepcopy(expected.config)).state_dict())
    fresh = other(expected)
    report = load_init_weights(fresh, origin, strict=False)
    if report.missing and not lacking(base, origin):
        raise FailedError(f"missing {list(report.missing)[:3]} of {len(own)}")
    if report.missing:
        return "skipped: the files do not have all of it"
    return same_state(fresh, expected)


def lacking(base: Any, origin: Path) -> bool:
    """Whether transformers misses tensors of a class in files."""
    _, told = base.from_pretrained(origin, output_loading_info=True)
    return bool(told["missing_keys"])


def damage(origin: Path, work: Path, reference: Any) -> str:
    """A copy that lacks a key, and one with another shape: both are found, by check and by load."""
    tensors = tensors_of(origin)
    wholes = [key for key, tensor in tensors.items() if tensor.numel() > 1]
    lost = wholes[len(wholes) // 2]
    shorter = {**tensors, lost: tensors[lost].flatten()[:-1].contiguous()}
    less = {key: tensor for key, tensor in tensors.items() if key != lost}
    for name, some in (("less", less), ("shorter", shorter)):
        place = work / name
        place.mkdir(parents=True)
        for file in origin.iterdir():
            if file.suffix == ".json" and "index" not in file.name:
                shutil.copy(file, place)
        save_file({k: t.clone() for k, t in some.items()}, place / "model.safetensors")
        coverage = check(place, against=reference)
        if coverage:
            raise FailedError(f"{name} {lost} passes the check")
        if not any(
            lost in f"{f.key} {f.why}" or f.key in reference.state_dict()
            for part in (coverage.missing, coverage.misshapen)
            for f in part
        ):
            raise FailedError(f"{name} {lost} is not told")
        both = {f.key for f in coverage.missing} & {f.key for f in coverage.unknown}
        if both:
            raise FailedError(f"missing and unknown: {sorted(both)[:3]}")
        fresh = other(reference)
        try:
            load_init_weights(fresh, place)
        except DcpconvError:
            continue
        raise FailedError(f"{name} {lost} loads")
    return OK


def namings(one: Architecture, origin: Path, work: Path, reference: Any) -> str:
    """Every other naming: refused, or its own parameter file leads back to the same logits."""
    if one.kind != "CAUSAL_LM":
        return "skipped: no language model"
    expected = outputs_of(reference)
    if expected is None:
        return "skipped: cannot be run"
    same, refused = [], []
    for name in sorted(keymaps()):
        place = work / name
        if name.startswith("hf-memory"):
            continue
        form: Any = "hf" if name.startswith("hf") else "dcp"
        try:
            convert(origin, place, form=form, to=name)
        except DcpconvError:
            refused.append(name)
            continue
        back = place
        if form != "hf":
            back = work / f"{name}-hf"
            is_told = find_config(place) is not None  # else the user tells what it is
            told: Any = {} if is_told else {"assets": origin, "from_": name}
            try:
                convert(place, back, form="hf", to="hf", **told)
            except DcpconvError as error:
                raise FailedError(f"{name} cannot go back: {brief(error)}") from None
        found = AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
        outputs = outputs_of(found)
        close = outputs is not None and all(
            torch.allclose(a, b, atol=1e-4, rtol=1e-3)
            for a, b in zip(outputs[:1], expected[:1], strict=True)
        )
        if not close:
            raise FailedError(f"{name} gives other logits (by way of {type(found).__name__})")
        same.append(name)
    if not same:
        return f"{OK}, all {len(refused)} refused"
    return f"{OK}, same logits: {' '.join(same)}"


def outputs_of(model: Any) -> list[Tensor] | None:
    """What the model makes of inputs that its forward names; ``None`` if it cannot be run so."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.randint(10, 90, (2, 9), generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(10, 90, (2, 5), generator=generator)
    if not inputs and "pixel_values" in names:
        size = getattr(config, "image_size", 32)
        across = size if isinstance(size, int) else 32
        channels = getattr(config, "num_channels", 3)
        inputs["pixel_values"] = torch.randn((1, channels, across, across), generator=generator)
    if not inputs:
        return None
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            made = model(**inputs)
        return list(_tensors(made))
    except Exception:  # noqa: BLE001 - inputs are guessed
        return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def same_outputs(one: list[Tensor], other: list[Tensor] | None) -> bool:
    """Equal, NaN to NaN."""
    return (
        other is not None
        and len(one) == len(other)
        and all(torch.allclose(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))
    )


def as_json(results: Results) -> str:
    """One line of the results."""
    return json.dumps(results)
