"""``dcpconv families check TABLE SRC``: a table is right if the logits stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcpconv.cli import main as command_line
from dcpconv.families.keymaps import keymaps
from support.models.hf_models import save_hf, tiny


def told(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[object, str]:
    monkeypatch.setattr("sys.argv", ["dcpconv", "families", *words])
    code: object = 0
    try:
        command_line()
    except SystemExit as exited:
        code = exited.code or 0
    out = capsys.readouterr()
    return code, out.out + out.err


def own_table(directory: Path, *, wrong: bool) -> Path:
    text = keymaps()["hf-smollm3"].file.read_text()
    text = text.replace('"hf-smollm3"', '"mine"', 1).replace('family        = "hf"\n', "")
    if wrong:
        text = text.replace('"(h two p) d"', '"(h p two) d"')
    (directory / "mine.toml").write_text(text)
    return directory / "mine.toml"


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_logits_tell_a_right_table_from_a_wrong_one(
    tmp_path: Path,
    *,
    wrong: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = save_hf(tiny("smollm3"), tmp_path / "hf")
    table = own_table(tmp_path, wrong=wrong)
    words = ["check", str(table), str(source), "--to", "hf-llama"]
    code, out = told(words, capsys, monkeypatch)
    assert "sound" in out
    assert "of their standard deviation, as hf-llama" in out
    assert (code, "another model" in out) == ((1, True) if wrong else (0, False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mine.toml"]


def test_what_transformers_cannot_load_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_hf(tiny("smollm3"), tmp_path / "hf")
    table = own_table(tmp_path, wrong=False)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", _fail)
    words = ["check", str(table), str(source), "--to", "hf-llama"]
    code, out = told(words, capsys, monkeypatch)
    assert code == 2
    assert "transformers cannot load it" in out
    assert "model's own code" in out


def _fail(*_: object, **__: object) -> None:
    raise ValueError("no such class")
