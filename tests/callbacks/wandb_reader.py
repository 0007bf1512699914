"""A reader for the .wandb file of an offline W&B run; W&B has removed its own."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024


def read_run(folder: Path, timeout: float = 20.0, killed: bool = False) -> dict[str, Any]:
    """Read an offline run.

    Args:
        folder: directory of the run.
        timeout: seconds to wait for the record that ends the run; ``wandb.finish()`` returns before it is written.
        killed: do not wait, because a killed run has no such record.

    Returns:
        ``id``, ``project``, ``history`` (list of dicts), ``config``, ``files`` and ``metrics``.
    """
    end = time.monotonic() + timeout
    while not list(folder.glob("run-*.wandb")):
        assert time.monotonic() < end, f"{folder}: expected a .wandb file, found none"
        time.sleep(0.05)
    (path,) = folder.glob("run-*.wandb")
    while not killed and not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < end, f"{path}: expected the record that ends the run, found none"
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
        if BLOCK - position % BLOCK < 7:  # the rest of the block is too short for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):  # still being written
            return
        if kind in (1, 4):  # complete, or the last fragment
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
