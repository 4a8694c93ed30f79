"""Parameter files that are found anywhere, and files that are none: one error with every field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcpconv.core.errors import SpecError
from dcpconv.core.spec import RopeScaling
from dcpconv.families.configs import find_config, hf, lingua, read_spec, write_config
from support.models.config_files import LLAMA3, SIZES, change, save


def test_every_bad_field_is_named_at_once(tmp_path: Path) -> None:
    fields = {"model_type": "llama"} | SIZES | {"hidden_size": "big", "tie_word_embeddings": 1}
    fields |= {"eos_token_id": "x"}
    del fields["vocab_size"]
    with pytest.raises(SpecError) as raised:
        read_spec(save(tmp_path, fields))
    assert str(raised.value).splitlines() == [
        "parameter file has 4 fields that cannot be used",
        f"  file      {tmp_path / 'config.json'}",
        "  field     vocab_size: expected a value, found nothing",
        "  field     hidden_size: expected a valid integer, found 'big'",
        "  field     tie_word_embeddings: expected a valid boolean, found 1",
        "  field     eos_token_id: expected a valid integer or a valid list, found 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "headline"),
    [
        pytest.param("", "parameter file is not JSON", id="empty"),
        pytest.param("{", "parameter file is not JSON", id="truncated"),
        pytest.param("[" * 200_000, "parameter file is not JSON", id="nested-too-deeply"),
        pytest.param("[]", "parameter file is not a JSON object", id="list"),
        pytest.param("{}", "parameter file is of no known family", id="no-fields"),
        pytest.param('{"a": 1}', "parameter file is of no known family", id="something-else"),
        pytest.param(
            json.dumps({"model_type": "llama"} | SIZES | {"num_attention_heads": 7}),
            "head_dim is not stated and does not follow",
            id="head_dim-does-not-follow",
        ),
        pytest.param(
            json.dumps({"model_type": "llama"} | SIZES | {"num_key_value_heads": 4}),
            "parameter file has 1 field that cannot be used",
            id="heads-do-not-divide",
        ),
        pytest.param(
            json.dumps({"model_type": "llama"} | SIZES | {"num_hidden_layers": 10**12}),
            "parameter file has 1 field that cannot be used",
            id="absurd-layers",
        ),
        pytest.param(
            json.dumps({"model_type": 3} | SIZES),
            "parameter file has 3 fields that cannot be used",
            id="type-of-no-type",
        ),
        pytest.param(
            json.dumps({"architectures": [1]} | SIZES),
            "parameter file has 4 fields that cannot be used",
            id="architecture-of-no-name",
        ),
    ],
)
def test_a_bad_file_is_one_error(tmp_path: Path, text: str, headline: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError) as raised:
        read_spec(tmp_path)
    assert raised.value.headline == headline


JUNK: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    10**400,
    "x",
    [],
    ["x"],
    [[]],
    {},
    {"x": {}},
)


@pytest.mark.parametrize("written", ["hf", "lingua"])
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:12])
def test_junk_in_any_place_is_read_or_is_our_error(written: str, junk: object) -> None:
    scaled = change({"rope_scaling": RopeScaling(kind="llama3", parameters=LLAMA3)})
    fields: dict[str, Any] = write_config(written, scaled)
    read = hf.read if written == "hf" else lingua.read
    for holder in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name, value in list(holder.items()):
            holder[name] = junk
            try:
                read(fields, Path("any.json"))
            except SpecError as error:
                assert ("file", Path("any.json")) in error.facts  # noqa: PT017  reading may succeed
            holder[name] = value


def test_a_directory_without_a_file_is_an_error(tmp_path: Path) -> None:
    assert find_config(tmp_path) is None
    assert find_config(tmp_path / "absent") is None
    with pytest.raises(SpecError, match="no parameter file"):
        read_spec(tmp_path)


def test_the_file_is_found_from_any_side(tmp_path: Path) -> None:
    save(tmp_path, {}, "params.json")
    assert find_config(tmp_path / "consolidated.pth") == tmp_path / "params.json"
    save(tmp_path, {})
    (tmp_path / "model.safetensors").touch()
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "config.json"):
        assert find_config(path) == tmp_path / "config.json"
