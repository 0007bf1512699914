"""The run at Weights & Biases: online where somebody is logged in, else offline with one printed line."""

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
    run_folder: str | os.PathLike[str],
    project: str,
    run_id: str,
    mode: Mode = "auto",
    name: str | None = None,
    init_timeout: float = 25.0,
    **init: Any,
) -> WandbLogger | None:
    """Starts, or goes on with, the W&B run ``run_id`` and returns its logger; None where W&B is off or not usable.

    Call it on every rank, after the ranks have been started: rank 0 makes the run, the others a silent logger. It never
    asks anything, never raises because of W&B and prints at most one line. Files go to ``<run_folder>/wandb``. A
    resumed run passes the same ``run_id``: online it goes on in place, offline it gets a second folder there, and
    ``wandb sync`` joins the two.

    Args:
        run_folder: the folder of the run.
        project: W&B's project.
        run_id: our id of the run, letters, digits, ``-`` and ``_``.
        mode: ``auto`` is online with a key (WANDB_API_KEY, netrc, W&B's settings) and offline without; the environment
            variable WANDB_MODE replaces ``auto``.
        name: the run's name in the W&B pages; the run folder's name where None.
        init_timeout: seconds until an unreachable server makes the run an offline one.
        init: passed on to ``wandb.init``: entity, group, tags, notes ...
    """
    asked = _asked(mode)
    if asked == "disabled":
        return None
    folder = Path(run_folder).absolute()
    common: dict[str, Any] = {"save_dir": str(folder), "project": project, "id": run_id, "name": name or folder.name}
    # Must precede the import: W&B reads it there.
    os.environ.setdefault("WANDB_SILENT", "true")
    rank = getattr(rank_zero_only, "rank", 0)
    try:
        if rank != 0:
            return WandbLogger(**common)
        logger, line = _start(asked, common, init, init_timeout)
    except Exception as error:  # a broken installation or a full disk fails in many ways; none is worth the run
        if rank == 0:
            print(f"W&B: not usable ({_first_line(error)}); this run is only in {folder}", flush=True)
        return None
    print(f"W&B: {line}", flush=True)
    return logger


def has_credentials() -> bool:
    """Whether W&B has a key or an identity token for its server. Asks neither a person nor the network."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    servers = [settings.base_url]
    if settings.base_url == wandb.Settings().base_url:
        servers.append(OLD_SERVER)  # where W&B lived when most people logged in; W&B still takes that entry
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        for server in servers:
            entry = entries.authenticators(urlsplit(server).netloc)
            if entry and entry[2]:
                return True
    return False


def _asked(mode: Mode) -> str:
    wanted = os.environ.get("WANDB_MODE", "").lower() if mode == "auto" else mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1") and mode == "auto":
        wanted = "disabled"
    return {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(wanted, "online")


def _start(asked: str, common: dict[str, Any], init: dict[str, Any], timeout: float) -> tuple[WandbLogger, str]:
    """The logger of a run that has begun, and the line that says where it is recorded."""
    import wandb

    folder = Path(common["save_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if wandb.run is not None and (wandb.run.id != common["id"] or not Path(wandb.run.dir).is_relative_to(folder)):
        wandb.finish()
    why = "recording offline"
    if asked == "online" and not has_credentials():
        asked, why = "offline", "not logged in, so recording offline; to go online next time: wandb login"
    if asked == "online":
        try:
            logger = _begin("online", common, init, timeout)
            return logger, str(logger.experiment.url)
        except Exception as error:  # network, key, quota, service: one answer to all
            why = f"no connection ({_first_line(error)}), so recording offline"
            # The failed run's id stays in use in W&B's service until that ends.
            wandb.teardown()
    return _begin("offline", common, init, timeout), f"{why}; to sync this run: wandb sync {folder}/wandb/offline-run-*"


def _begin(mode: str, common: dict[str, Any], init: dict[str, Any], timeout: float) -> WandbLogger:
    import wandb

    wandb.setup()  # only from here on W&B knows that it is to be silent
    settings = wandb.Settings(
        silent=True,
        console="off",  # capturing the console costs time at each print, and progress bars fill it with noise
        init_timeout=timeout,
        login_timeout=timeout,
        summary_timeout=int(timeout),
        finish_timeout=600.0,  # a server that goes away must not hold the process for ever; the files stay
    )
    logger = WandbLogger(**common, mode=mode, settings=settings, **init)
    _ = logger.experiment  # creates the run now, so that a failure is met here and not at the first log
    return logger


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
