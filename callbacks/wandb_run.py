"""The run in Weights & Biases: online if the user is logged in, else offline with one printed line."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

Mode = Literal["auto", "online", "offline", "disabled"]

OLD_SERVER = "https://api.wandb.ai"


def make_wandb_logger(
    run_directory: str | os.PathLike[str],
    project: str,
    run_id: str,
    mode: Mode = "auto",
    name: str | None = None,
    init_timeout: float = 25.0,
    **init: Any,
) -> WandbLogger | None:
    """Start or continue the W&B run ``run_id`` and return its logger; None if W&B is disabled or not usable.

    Call it on every rank after the ranks have been started: rank 0 creates the run, the others a silent logger. It
    never prompts, never raises because of W&B, and prints at most one line. Files go to ``<run_directory>/wandb``. A
    resumed run passes the same ``run_id``: online it continues in place; offline it gets a second directory there, and
    ``wandb sync`` joins both.

    Args:
        run_directory: directory of the run.
        project: project in W&B.
        run_id: id of the run: letters, digits, ``-`` and ``_``.
        mode: ``auto`` is online with a key (WANDB_API_KEY, netrc, W&B's settings) and offline without; the environment
            variable WANDB_MODE replaces ``auto``.
        name: name of the run in W&B; None: the name of the run directory.
        init_timeout: seconds after which the run is offline if the server is unreachable.
        init: arguments of ``wandb.init``: entity, group, tags, notes ...
    """
    requested = _requested(mode)
    if requested == "disabled":
        return None
    folder = Path(run_directory).absolute()
    common: dict[str, Any] = {"save_dir": str(folder), "project": project, "id": run_id, "name": name or folder.name}
    # W&B reads this variable when it is imported.
    os.environ.setdefault("WANDB_SILENT", "true")
    rank = getattr(rank_zero_only, "rank", 0)
    try:
        if rank != 0:
            return WandbLogger(**common)
        logger, line = _start(requested, common, init, init_timeout)
    except Exception as error:  # a broken installation, a full disk ...: the run goes on
        if rank == 0:
            print(f"W&B: not usable ({_first_line(error)}); this run is recorded in {folder} only", flush=True)
        return None
    print(f"W&B: {line}", flush=True)
    return logger


def has_credentials() -> bool:
    """Return whether W&B has a key or an identity token for its server, without a prompt or network access."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    servers = [settings.base_url]
    if settings.base_url == wandb.Settings().base_url:
        servers.append(OLD_SERVER)  # W&B's former address; W&B still accepts its netrc entry
    netrc_file = os.environ.get("NETRC")
    for path in [Path(netrc_file)] if netrc_file else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        for server in servers:
            entry = entries.authenticators(urlsplit(server).netloc)
            if entry and entry[2]:
                return True
    return False


def _requested(mode: Mode) -> str:
    value = os.environ.get("WANDB_MODE", "").lower() if mode == "auto" else mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1") and mode == "auto":
        value = "disabled"
    return {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(value, "online")


def _start(requested: str, common: dict[str, Any], init: dict[str, Any], timeout: float) -> tuple[WandbLogger, str]:
    """Start the run; return its logger and a line that says where it is recorded."""
    import wandb

    folder = Path(common["save_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if wandb.run is not None and (wandb.run.id != common["id"] or not Path(wandb.run.dir).is_relative_to(folder)):
        wandb.finish()
    reason = "recording offline"
    if requested == "online" and not has_credentials():
        requested, reason = "offline", "not logged in, so recording offline; to go online next time: wandb login"
    if requested == "online":
        try:
            logger = _begin("online", common, init, timeout)
            return logger, str(logger.experiment.url)
        except Exception as error:  # network, key, quota, service
            reason = f"no connection ({_first_line(error)}), so recording offline"
            # W&B's service keeps the id of the failed run in use until the service ends.
            wandb.teardown()
    return _begin(
        "offline", common, init, timeout
    ), f"{reason}; to sync this run: wandb sync {folder}/wandb/offline-run-*"


def _begin(mode: str, common: dict[str, Any], init: dict[str, Any], timeout: float) -> WandbLogger:
    import wandb

    wandb.setup()  # makes the silent setting effective
    settings = wandb.Settings(
        silent=True,
        console="off",  # capturing costs time at each print, and progress bars fill the log
        init_timeout=timeout,
        login_timeout=timeout,
        summary_timeout=int(timeout),
        finish_timeout=600.0,  # do not wait forever for a lost server; the files remain
    )
    logger = WandbLogger(**common, mode=mode, settings=settings, **init)
    _ = logger.experiment  # creates the run now, so that it fails here and not at the first log
    return logger


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
