"""External proposals: those of a batch, or Selective Search on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errors import UserError
from lightning_modules.components.selective_search import selective_search


def training_proposals(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the proposals of a batch, see `pad_proposals`.

    Raises:
        UserError: the batch has none.
    """
    if "proposals" not in batch:
        raise UserError(
            "proposals: expected a batch with proposals, found none; compute them with python -m tools.proposals and "
            "set --data.proposals to their folder"
        )
    return pad_proposals(batch["proposals"])


def inference_proposals(
    images: Tensor | Sequence[Tensor], proposals: Sequence[Tensor] | None = None, top: int = 2000
) -> tuple[Tensor, Tensor]:
    """Return the given proposals, or run Selective Search, see `pad_proposals`.

    The search runs on the CPU, one image after the other, and takes about a second per image.

    Args:
        images: uint8 (B, 3, H, W), or a list of (3, H, W).
        proposals: float (P, 4), xyxy in pixels, per image; None runs Selective Search.
        top: maximum number of boxes per image that Selective Search returns.
    """
    if proposals is None:
        arrays = [image.permute(1, 2, 0).contiguous().cpu().numpy() for image in images]
        proposals = [torch.from_numpy(selective_search(array, top)).to(images[0].device) for array in arrays]
    return pad_proposals(proposals)


def pad_proposals(proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack proposals, padded with 0.

    Args:
        proposals: float (P, 4), xyxy in pixels, per image; at least one image.

    Returns:
        Boxes, float32 (B, P, 4), with P at least 1, and which of them are valid, bool (B, P).
    """
    boxes = pad_sequence(list(proposals), batch_first=True).float()
    boxes = boxes if boxes.shape[1] else F.pad(boxes, (0, 0, 0, 1))
    # Lengths are known on the host, so that no synchronization with the device is needed.
    counts = torch.tensor([[len(p)] for p in proposals]).to(boxes.device, non_blocking=True)
    return boxes, torch.arange(boxes.shape[1], device=boxes.device) < counts
