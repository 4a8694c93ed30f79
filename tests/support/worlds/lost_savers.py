"""Two ranks that save, of which one dies when half is written; run as a script by ``run_ranks``.

The file ``victim`` in their directory says which one, and ``target`` where the result would go, if
not below their directory; the survivor writes down what it heard.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from dcpconv import save_weights
from dcpconv.conversion.saving.whole_files import InStore
from dcpconv.conversion.saving.writing import write_share

TIMEOUT_S = 30
"""Of the group: a survivor that waited for longer would not end with the test."""


def main() -> None:
    rank, ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = f"file://{directory}/rendezvous"
    span = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=span)

    def dies(share: Any, **options: Any) -> NoReturn:
        write_share(share, **options)
        os._exit(0)

    def dies_afar(*_: Any) -> NoReturn:
        os._exit(0)

    if rank == int((directory / "victim").read_text()):
        patch("dcpconv.conversion.saving.storage_writer.write_share", dies).start()
        patch.object(InStore, "settle", dies_afar).start()
    afar = directory / "target"
    target = afar.read_text() if afar.exists() else directory / "out/hf"
    model = torch.nn.Sequential(torch.nn.Linear(300, 7), torch.nn.Linear(7, 300))
    fully_shard(model)
    found = {"error": "", "text": ""}
    try:
        save_weights(model, target, max_file_size=8500)
    except Exception as error:  # noqa: BLE001 - its class is what the test looks at
        found = {"error": type(error).__name__, "text": str(error)}
    (directory / "heard.json").write_text(json.dumps(found))
    os._exit(0)  # the group cannot be taken down: half of it is gone


if __name__ == "__main__":
    main()
