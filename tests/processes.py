"""Processes that run train.py, forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.preload"])


def train(args: Sequence[str], folder: Path, env: dict[str, str] | None = None, group: int = 0) -> BaseProcess:
    """Start ``python train.py ARGS`` in ``folder`` and process group ``group``; the output goes to ``log.txt``."""
    process = FORKSERVER.Process(target=_train, args=(list(args), str(folder), env or {}, group))
    process.start()
    return process


def _train(args: list[str], folder: str, env: dict[str, str], group: int) -> None:
    with contextlib.suppress(OSError):  # the leader of the group may have ended
        os.setpgid(0, group)
    # The fork server ignores Ctrl-C, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As in a process that was not forked: the workers of the loader are its children and end with it.
    multiprocessing.set_start_method("fork", force=True)
    # Another test may have left the address of its W&B service, where the id of the run is still in use.
    os.environ.pop("WANDB_SERVICE", None)
    os.environ.update(env)
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.close(0)  # as in CI: there is no terminal for prompts
    sys.argv = ["train.py", *args]
    import torch

    import train as program

    torch.set_num_threads(1)
    try:
        program.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def train_ranks(args: Sequence[str], folder: Path, ranks: int = 2) -> list[BaseProcess]:
    """Start one process per rank, as torchrun does, in one process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
        }  # fmt: skip
        group = processes[0].pid or 0 if processes else 0
        processes.append(train(args, folder, env, group))
    return processes


def finish(*processes: BaseProcess, timeout: float = 120) -> list[int | None]:
    """Wait for the processes and return their exit statuses; kill a process that hangs, whose status is None."""
    deadline = time.monotonic() + timeout
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
            codes.append(None)
        else:
            codes.append(process.exitcode)
    return codes


def wait_for(condition: Callable[[], object], process: BaseProcess, timeout: float = 90) -> None:
    """Wait until the condition holds; fail if the process ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.exitcode is None, f"the process ended first, with status {process.exitcode}"
        assert time.monotonic() < deadline, f"the condition does not hold after {timeout} s"
        time.sleep(0.01)
