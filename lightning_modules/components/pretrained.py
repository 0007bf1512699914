"""Weights that others have trained: found, fetched and loaded, with a line on what was left out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from errors import UserError

SCRATCH = "train from scratch: --model.weights null, or a config whose name ends in _scratch, where there is one"


def find_weights(network: str, weights: str, instead: str = SCRATCH) -> Path:
    """The file that ``weights`` names: a path, or a name among torchvision's weights of ``network``, then downloaded.

    ``instead`` is what a failed download advises as the way without.

    Raises:
        ValueError: there are no weights of that name.
        FileNotFoundError: there is no such file.
        RuntimeError: the download fails; the message says what to fetch and where to put it.
    """
    if "://" in weights:
        raise UserError(f"weights: expected DEFAULT or a file, found the URL {weights}: download it and name the file")
    if not re.fullmatch(r"DEFAULT|(IMAGENET1K|COCO)_[A-Z0-9]+", weights):
        if not Path(weights).is_file():
            raise UserError(f"weights: no file {weights}: expected DEFAULT or a file of weights")
        return Path(weights)
    if network not in torchvision.models.list_models():
        raise UserError(f"weights: torchvision has no weights for {network}, found {weights}: name a file or leave out")
    published = torchvision.models.get_model_weights(network).__members__
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
            raise UserError(f"weights: no download ({error}): fetch {url} and put it at {path}, or {instead}") from None
    return path


def load_weights(
    network: nn.Module,
    path: Path,
    name: str,
    *heads: str,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Loads a state dict, or a checkpoint that holds one, all but heads for another number of classes.

    ``heads`` are the modules that may be of another shape, missing or foreign. Prefixes ``network.`` (our checkpoints)
    and ``module.`` (DataParallel) are stripped; then ``convert``, if given, names and shapes them as the network does.
    Prints one line on what was not loaded. Raises ValueError, in one line, for a file that is not a state dict or is
    another network's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {re.sub(r"^(network|module)\.", "", key): value for key, value in state.items()}
        state = convert(state) if convert is not None else state
        shapes = {key: value.shape for key, value in state.items()}
    except Exception as error:
        raise UserError(
            f"weights: {path} is not a state dict or a checkpoint, or is damaged ({type(error).__name__}): "
            "expected a file written by torch.save with tensors only"
        ) from None
    own = network.state_dict()
    fits = {key for key in own if shapes.get(key) == own[key].shape}
    left = [key for key in own if key not in fits and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in own]
    wrong = [key for key in (*left, *foreign) if not key.startswith(tuple(f"{head}." for head in heads))]
    if wrong:
        raise UserError(
            f"weights: {path} is not of {name}: {len(wrong)} tensors are missing, foreign or of another shape, "
            f"{wrong[0]} first: expected the weights of that network"
        )
    network.load_state_dict({key: state[key] for key in fits}, strict=False)
    describe = [f"{k} {tuple(shapes[k]) if k in shapes else 'absent'} -> {tuple(own[k].shape)}" for k in left]
    tail = f"; newly initialized: {', '.join(describe)}" if left else ""
    tail += f"; left out: {', '.join(foreign)}" if foreign else ""
    rank_zero_only(print)(f"weights: {path} loaded into {name}{tail}", flush=True)
