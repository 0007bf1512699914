"""Reads an offline W&B run back: the records in its .wandb file, without W&B's own reader (which is gone)."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024


def read_run(folder: Path, patience: float = 20.0, killed: bool = False) -> dict[str, Any]:
    """``id``, ``project``, ``history`` (list of dicts), ``config``, ``files``, ``metrics`` of an offline run.

    ``wandb.finish()`` returns a moment before the file is whole, so this waits, ``patience`` seconds at most, for the
    record that says the run has ended; a ``killed`` run has none.
    """
    end = time.monotonic() + patience
    while not list(folder.glob("run-*.wandb")):
        assert time.monotonic() < end, f"{folder}: no run file in it"
        time.sleep(0.05)
    (path,) = folder.glob("run-*.wandb")
    while not killed and not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < end, f"{path}: the run has no end"
        time.sleep(0.05)
    run: dict[str, Any] = {"id": None, "project": None, "history": [], "config": {}, "files": [], "metrics": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run["id"], run["project"] = record.run.run_id, record.run.project
            run["config"].update(_values(record.run.config.update))
        elif kind == "config":
            run["config"].update(_values(record.config.update))
        elif kind == "history":
            run["history"].append(_values(record.history.item))
        elif kind == "files":
            run["files"] += [item.path for item in record.files.files]
        elif kind == "metric":
            run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return run


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pending = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # too little is left of the block for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):  # still being written
            return
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(pending)
            pending = b""


def _values(items: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *parents, name = item.nested_key or [item.key]
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = json.loads(item.value_json)
    return values
