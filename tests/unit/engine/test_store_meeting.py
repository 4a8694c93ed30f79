"""Records of ranks in the key-value store of torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcpconv.engine.worlds.seats import Seat
from dcpconv.engine.worlds.torchrun import meet
from support.worlds.conversions import agent


@pytest.mark.parametrize("length", [1, 4 << 20, 20 << 20])
def test_a_record_of_any_length_is_read_as_it_was_put(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store itself hangs up on a client that sends more than 8 MiB."""
    with agent(1) as given:
        for name, value in given[0].items():
            monkeypatch.setenv(name, value)
        meeting = meet(Seat(), "meet", Path("here"), hint="")
        assert meeting.get("record") is None
        record = {"digests": "0123456789abcdef" * (length // 16), "count": 3}
        meeting.put("record", record)
        assert meeting.get("record") == record
