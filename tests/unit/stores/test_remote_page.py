"""The transcripts of docs/remote.md, against a bucket of moto's server."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.machine.s3_server import serving_s3
from support.machine.transcripts import normalised, prepare, run_page

PAGE = Path(__file__).parents[3] / "docs" / "remote.md"


def test_transcripts_are_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    with serving_s3(monkeypatch) as bucket:
        bucket.client.create_bucket(Bucket="models")
        blocks = list(run_page(PAGE.read_text(), tmp_path))
    assert PAGE.name == "remote.md"
    assert len(blocks) == 3
    for expected, found in blocks:
        assert normalised(found) == normalised(expected)
