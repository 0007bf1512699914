"""Proposals that no network of ours makes: those that come with a batch, or Selective Search's, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errors import UserError
from lightning_modules.components.selective_search import selective_search


def given_proposals(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A batch's proposals to train on, as one tensor: see `fill_up_proposals`.

    Raises:
        ValueError: the batch has none.
    """
    if "proposals" not in batch:
        raise UserError(
            "proposals: expected a batch with boxes that may hold objects, found none: compute them with "
            "python -m tools.proposals and set --data.proposals to their folder"
        )
    return fill_up_proposals(batch["proposals"])


def external_proposals(
    images: Tensor | Sequence[Tensor], proposals: Sequence[Tensor] | None = None, top: int = 2000
) -> tuple[Tensor, Tensor]:
    """The proposals that are given or, where they are None, Selective Search's, as one tensor: see `fill_up_proposals`.

    The search runs on the CPU, one image after the other, about a second each.

    Args:
        images: uint8 (B,3,H,W), or a list of (3,H,W).
        proposals: float (P,4) xyxy in pixels of each image.
        top: boxes an image that are searched for, at most, the best.
    """
    if proposals is None:
        pictures = [image.permute(1, 2, 0).contiguous().cpu().numpy() for image in images]
        proposals = [torch.from_numpy(selective_search(p, top)).to(images[0].device) for p in pictures]
    return fill_up_proposals(proposals)


def fill_up_proposals(proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes float32 (B,P,4), 0 where an image has fewer, and bool (B,P), where there is one; P is at least 1.

    Args:
        proposals: float (P,4) of each image; at least one image.
    """
    boxes = pad_sequence(list(proposals), batch_first=True).float()
    boxes = boxes if boxes.shape[1] else F.pad(boxes, (0, 0, 0, 1))
    # The sizes of tensors are known without asking the device.
    counts = torch.tensor([[len(p)] for p in proposals]).to(boxes.device, non_blocking=True)
    return boxes, torch.arange(boxes.shape[1], device=boxes.device) < counts
