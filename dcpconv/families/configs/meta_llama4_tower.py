"""The tower of Llama 4: ``vision_args`` of Meta's params.json, ``vision_config`` of config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dcpconv.core.record import Json, Record
from dcpconv.core.spec import Count, Positive, Size
from dcpconv.families.configs.hf_fields import TEXT
from dcpconv.families.configs.parameters import Refusal, checked

_NAME = "Meta's Llama 4"
_THETA = 10_000.0
"""Source: ``get_rope_freqs`` of llama-models 0.3.0 ``llama4/vision/encoder.py``."""

_TOKENS: Mapping[str, object] = {
    "boi_token_index": 200_080,
    "eoi_token_index": 200_081,
    "image_token_index": 200_092,
}
"""Begin and end of an image, and one of its patches.  Source: ``llama4/tokenizer.py``, same
package."""

_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 768,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}
"""Source: ``Llama4VisionConfig`` of transformers 5.23.0."""


class _Box(Record):
    height: Size
    width: Size


class _Vision(Record, extra="allow"):
    image_size: dict[str, Json]
    patch_size: dict[str, Json]
    dim: Size
    n_layers: Count
    n_heads: Count
    mlp_ratio: Positive
    output_dim: Size
    pixel_shuffle_ratio: Positive


class _VisionConfig(Record, extra="allow"):
    hidden_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_channels: Count
    intermediate_size: Size
    vision_output_dim: Size
    image_size: int | list[int]
    patch_size: int | list[int]
    pixel_shuffle_ratio: Positive
    projector_input_dim: Size
    projector_output_dim: Size
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Json] | None = None


def beside(
    text: Mapping[str, object], vision: Mapping[str, object], file: Path
) -> tuple[dict[str, object], tuple[str, ...]]:
    """A config.json of the language model and its tower, and what it cannot say of the tower.

    Args:
        text: The config.json of the language model alone.
        vision: ``vision_args``.
        file: For errors.

    Raises:
        SpecError: Facts list every field that does not fit.
    """
    said = checked(_Vision, vision, file)
    image, patch = (checked(_Box, box, file) for box in (said.image_size, said.patch_size))
    width = int(said.mlp_ratio * said.dim)
    fields: dict[str, object] = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "tie_word_embeddings": False,
        **_TOKENS,
        TEXT: {name: value for name, value in text.items() if name != "architectures"},
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": said.dim,
            "hidden_act": "gelu",
            "num_hidden_layers": said.n_layers,
            "num_attention_heads": said.n_heads,
            "num_channels": 3,
            "intermediate_size": width,
            "vision_output_dim": said.output_dim,
            "image_size": image.height,
            "patch_size": patch.height,
            "norm_eps": 1e-5,
            "pixel_shuffle_ratio": said.pixel_shuffle_ratio,
            "projector_input_dim": said.output_dim,
            "projector_output_dim": said.output_dim,
            "rope_theta": _THETA,
            "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
        },
    }
    strangers = [
        f"vision_args.{name}: {box.height} by {box.width}"
        for name, box in (("image_size", image), ("patch_size", patch))
        if box.height != box.width
    ]
    if _shuffled(said.dim, said.pixel_shuffle_ratio) != width:
        strangers.append(f"vision_args.mlp_ratio: {said.mlp_ratio}")
    others = (said.model_extra or {}).items()
    strangers += [f"vision_args.{name}: {value!r}" for name, value in others if value is not None]
    return fields, tuple(strangers)


def refusals(stated: Mapping[str, object]) -> Iterator[Refusal]:
    """What Meta's code cannot compute of a tower.

    Args:
        stated: A config.json.
    """
    vision = _stated(stated)
    if vision is None:
        return
    width = _shuffled(vision.hidden_size, vision.pixel_shuffle_ratio)
    theta = (vision.rope_parameters or {}).get("rope_theta", vision.rope_theta)
    for name, value, right in (
        ("num_channels", vision.num_channels, 3),
        ("intermediate_size", vision.intermediate_size, width),
        ("projector_input_dim", vision.projector_input_dim, vision.vision_output_dim),
        ("projector_output_dim", vision.projector_output_dim, vision.vision_output_dim),
        ("rope_parameters.rope_theta", theta or _THETA, _THETA),
    ):
        if value != right:
            yield Refusal(f"config.vision_config.{name}", f"{value}: {_NAME} has {right} here")


def write(stated: Mapping[str, object]) -> dict[str, object] | None:
    """``vision_args`` for the tower that a config.json describes; ``None`` where it has none."""
    vision = _stated(stated)
    if vision is None:
        return None
    dim, width = vision.hidden_size, vision.intermediate_size
    ratio = width / dim
    return {
        "image_size": _box(vision.image_size),
        "patch_size": _box(vision.patch_size),
        "dim": dim,
        "n_layers": vision.num_hidden_layers,
        "n_heads": vision.num_attention_heads,
        # Meta's code cuts the product off.
        "mlp_ratio": ratio if int(ratio * dim) == width else (width + 0.5) / dim,
        "output_dim": vision.vision_output_dim,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
    }


def _stated(stated: Mapping[str, object]) -> _VisionConfig | None:
    fields = stated.get("vision_config")
    if not isinstance(fields, Mapping):
        return None
    return checked(_VisionConfig, {**_DEFAULTS, **fields}, Path("config.json"))


def _box(size: int | list[int]) -> dict[str, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height, "width": width}


def _shuffled(dim: int, ratio: float) -> int:
    """Channels of a patch that stands for several.  Source: ``PixelShuffleMLP`` of llama-models
    0.3.0 ``llama4/vision/embedding.py``."""
    return int(dim // ratio**2)
