"""Find, download and load pretrained weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from errors import UserError

TRAIN_FROM_SCRATCH = "train from scratch with --model.weights null, or a config whose name ends in _scratch"


def find_weights(network: str, weights: str, alternative: str = TRAIN_FROM_SCRATCH) -> Path:
    """Return the file of pretrained weights; torchvision's are downloaded.

    Args:
        network: torchvision's name of the network.
        weights: a file, or the name of torchvision's weights for ``network``: IMAGENET1K_V1, IMAGENET1K_V2, or DEFAULT,
            the newest, ...
        alternative: advice for a failed download, in the imperative.

    Raises:
        UserError: no such weights or file, or the download fails; the message says what to fetch and where to put it.
    """
    if "://" in weights:
        raise UserError(f"weights: expected DEFAULT or a file, found the URL {weights}; download it and name the file")
    has_weights = network in torchvision.models.list_models()
    published = torchvision.models.get_model_weights(network).__members__ if has_weights else {}
    if not re.fullmatch(r"DEFAULT|(IMAGENET1K|COCO)_[A-Z0-9]+", weights):
        if not Path(weights).is_file():
            names = f"; names of weights for {network}: {', '.join(published)}" if published else ""
            raise UserError(f"weights: expected DEFAULT or a file of weights, found no file {weights}{names}")
        return Path(weights)
    if not has_weights:
        raise UserError(f"weights: expected a file or null for {network} (torchvision has none), found {weights}")
    if weights not in published:
        raise UserError(f"weights: expected one of {', '.join(published)} for {network}, found {weights}")
    url = published[weights].value.url
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = re.search(r"-([a-f0-9]+)\.", path.name)
            torch.hub.download_url_to_file(url, str(path), hash_prefix[1] if hash_prefix else None)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"weights: download failed ({error}); fetch {url} and put it at {path}, or {alternative}"
            ) from None
    return path


def read_torch_file(path: Path) -> dict[str, Any]:
    """Return the content of a file of ``torch.save`` without the values of its tensors.

    It is empty if the file cannot be read, which `load_weights` reports.
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:
        return {}
    return content if isinstance(content, dict) else {}


def load_weights(
    network: nn.Module,
    path: Path,
    name: str,
    *heads: str,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load a state dict, or a checkpoint that contains one, and print one line on what was not loaded.

    The prefixes ``network.`` (our checkpoints) and ``module.`` (DataParallel) are removed from the keys.

    Args:
        network: the network to load into.
        path: the file.
        name: name of the network, for messages.
        *heads: modules that may be missing in the file, have another shape, or exist only there. Tensors of nan count
            as missing.
        convert: maps the state dict to the names and shapes of ``network``.

    Raises:
        UserError: the file is not a state dict, or is that of another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {re.sub(r"^(network|module)\.", "", key): value for key, value in state.items()}
        # Torchvision's VGG-16 of features alone has nan in fc6, fc7 and fc8.
        state = {key: value for key, value in state.items() if not value.isnan().all()}
        state = convert(state) if convert is not None else state
        shapes = {key: value.shape for key, value in state.items()}
    except Exception as error:
        raise UserError(
            f"weights: expected a state dict or checkpoint (tensors only, written by torch.save), "
            f"found {path}, which cannot be read ({type(error).__name__})"
        ) from None
    current = network.state_dict()
    matching = {key for key in current if shapes.get(key) == current[key].shape}
    missing = [key for key in current if key not in matching and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in current]
    wrong = [key for key in (*missing, *unexpected) if not key.startswith(tuple(f"{head}." for head in heads))]
    if wrong:
        raise UserError(
            f"weights: expected weights of {name}, found {path} with {len(wrong)} tensors that are missing, unexpected "
            f"or of another shape, such as {wrong[0]}"
        )
    network.load_state_dict({key: state[key] for key in matching}, strict=False)
    initialized = [
        f"{key} {tuple(shapes[key]) if key in shapes else 'absent'} -> {tuple(current[key].shape)}" for key in missing
    ]
    summary = f"; newly initialized: {', '.join(initialized)}" if initialized else ""
    summary += f"; skipped: {', '.join(unexpected)}" if unexpected else ""
    rank_zero_only(print)(f"weights: {path} loaded into {name}{summary}", flush=True)
