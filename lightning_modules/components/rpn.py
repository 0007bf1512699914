"""Region proposal network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from errors import UserError
from lightning_modules.components.anchors import make_anchors
from lightning_modules.components.backbones import Trunk
from lightning_modules.components.boxes import (
    Sample,
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    pad_targets,
    rank_in_group,
)

Normalizer = Literal["paper", "authors"]


class RPNOutput(NamedTuple):
    """What the network says of the A anchors of each of B images.

    Attributes:
        objectness: float32 (B,A), logits.
        offset: float32 (B,A,4), see `encode_boxes`.
        anchors: float32 (A,4) xyxy in pixels; they reach beyond the image.
        counts: how many anchors are on each map.
        places: of all maps.
    """

    objectness: Tensor
    offset: Tensor
    anchors: Tensor
    counts: list[int]
    places: int


class RegionProposalNetwork(nn.Module):
    """A 3x3 convolution, and two of 1x1: an objectness and four offsets for each anchor. One for all maps.

    The authors have two logits an anchor and a softmax, which is the same as one and a sigmoid.

    Args:
        trunk: what computes the maps.
        sizes: roots of the anchors' areas in pixels. Of one map, all at each place; of several, one a map.
        ratios: heights / widths of the anchors.
    """

    def __init__(self, trunk: Trunk, sizes: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__()
        maps = len(trunk.strides)
        if not sizes or not ratios or min(*sizes, *ratios) <= 0 or (maps > 1 and len(sizes) != maps):
            expected = f"{maps} numbers above 0, one a map" if maps > 1 else "numbers above 0"
            raise UserError(f"anchor_sizes: expected {expected}, found {list(sizes)} with ratios {list(ratios)}")
        self.strides, self.ratios = trunk.strides, tuple(ratios)
        self.sizes = tuple((size,) for size in sizes) if maps > 1 else (tuple(sizes),)
        self.head = RPNHead(trunk.channels, len(self.sizes[0]) * len(ratios))  # normals of 0.01, as the authors'

    def forward(self, maps: list[Tensor]) -> RPNOutput:
        """Maps float (B,C,h,w), as many as there are strides, to what is said of all anchors."""
        logits, moves = self.head(maps)
        anchors = [
            make_anchors(sizes, self.ratios, stride, m.shape[-2:], m.device)
            for sizes, stride, m in zip(self.sizes, self.strides, maps, strict=True)
        ]
        batch = len(logits[0])
        objectness = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1) for level in logits], 1).float()
        offset = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in moves], 1).float()
        counts = [len(level) for level in anchors]
        places = sum(m.shape[-2] * m.shape[-1] for m in maps)
        return RPNOutput(objectness, offset, torch.cat(anchors), counts, places)


DEVIATIONS = (1.0, 1.0, 1.0, 1.0)


class RPNTargets(NamedTuple):
    """What is to be said of the A anchors of each of B images.

    Attributes:
        positive: bool (B,A), has an object.
        negative: bool (B,A), has none. What is neither is not learned from.
        offset: float32 (B,A,4), see `encode_boxes`; of those without an object without meaning.
    """

    positive: Tensor
    negative: Tensor
    offset: Tensor


def encode(target: Sequence[dict[str, Tensor]], anchors: Tensor, size: Tensor, crossing: bool = False) -> RPNTargets:
    """An anchor is positive that overlaps an object by an IoU of 0.7 or more than that, or as much as any other overlaps
    the same object; negative if it overlaps none by 0.3 (section 3.1.2).

    Args:
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        anchors: float (A,4) xyxy in pixels.
        size: float (B,2), width and height of the images in pixels.
        crossing: use anchors that reach beyond the image, which the paper leaves out in training.
    """
    boxes, _ = pad_targets(target)
    overlap = batched_box_iou(boxes, anchors)
    used = torch.ones_like(overlap[:, 0], dtype=torch.bool)
    if not crossing:
        used = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= size[:, None])).all(2)
        overlap = torch.where(used[:, None], overlap, 0)
    best, chosen = overlap.max(1)
    most = overlap.amax(2, keepdim=True)
    positive = (best >= 0.7) | ((overlap == most) & (most > 0)).any(1)
    truth = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    return RPNTargets(positive, used & ~positive & (best < 0.3), encode_boxes(truth, anchors, DEVIATIONS))


def rpn_loss(
    output: RPNOutput, targets: RPNTargets, drawn: Sample, normalizer: Normalizer = "paper", weight: float = 10.0
) -> dict[str, Tensor]:
    """Equation 1, the mean over the B images:

        1 / N_cls * sum L_cls(p, p*) + weight / N_reg * sum p* L_reg(t, t*)

    L_cls is the log loss of the drawn anchors, L_reg the smooth L1 of those among them that are positive.

    - ``paper``: N_cls is the number of anchors drawn of an image (256), N_reg that of the maps' places (about 2,400),
      and ``weight`` is lambda.
    - ``authors``: both are the number of anchors that could be drawn of the batch (py-faster-rcnn has one image a
      batch), ``weight`` is not used, and smooth L1 turns from square to straight at 1/9 (their sigma is 3).

    Args:
        output: see `RegionProposalNetwork`.
        targets: see `encode`.
        drawn: which anchors are learned from.
        normalizer, weight: see above.
    """
    logits = output.objectness.gather(1, drawn.indices)
    index = drawn.indices[..., None].expand(-1, -1, 4)
    errors = F.smooth_l1_loss(
        output.offset.gather(1, index),
        targets.offset.gather(1, index),
        reduction="none",
        beta=1.0 if normalizer == "paper" else 1 / 9,
    ).sum(2)
    entropy = F.binary_cross_entropy_with_logits(logits, drawn.positive.float(), reduction="none")
    log_loss, smooth = torch.where(drawn.valid, entropy, 0).sum(), torch.where(drawn.positive, errors, 0).sum()
    if normalizer == "authors":
        known = drawn.valid.sum().clamp_min(1)
        return {"rpn_class": log_loss / known, "rpn_box": smooth / known}
    images, count = drawn.indices.shape
    return {"rpn_class": log_loss / (images * count), "rpn_box": weight * smooth / (images * output.places)}


class Proposals(NamedTuple):
    """Boxes that may hold objects, the best first, filled up to n for each of B images.

    Attributes:
        boxes: float32 (B,n,4) xyxy in pixels, within the image; 0 where there is none.
        scores: float32 (B,n), the objectness, 0..1; -1 where there is none.
    """

    boxes: Tensor
    scores: Tensor

    @property
    def there(self) -> Tensor:
        """bool (B,n): there is a box."""
        return self.scores >= 0


def propose(
    output: RPNOutput, size: Tensor, before: int, after: int, nms_threshold: float = 0.7, least: float = 16.0
) -> Proposals:
    """Of each map the best ``before`` anchors, moved and clipped to the image; without those that overlap a better
    one, the best ``after`` of each image. No gradient goes through them.

    How many are left is known only to the device, which suppression waits for; nothing else here does.

    Args:
        output: see `RegionProposalNetwork`.
        size: float (B,2), width and height of the images in pixels.
        before, after: see above; of a pyramid each map is suppressed apart (Lin et al. 2017).
        nms_threshold: IoU.
        least: width and height in pixels below which a box is left out.
    """
    objectness, offset = output.objectness.detach(), output.offset.detach()
    images = len(objectness)
    best, start = [], 0
    for count in output.counts:
        best.append(objectness[:, start : start + count].topk(min(before, count), dim=1).indices + start)
        start += count
    index = torch.cat(best, 1)
    level = torch.cat([torch.full_like(b, i) for i, b in enumerate(best)], 1)
    scores = objectness.gather(1, index).sigmoid()
    boxes = decode_boxes(offset.gather(1, index[..., None].expand(-1, -1, 4)), output.anchors[index], DEVIATIONS)
    boxes = torch.minimum(boxes.clamp_min(0), size.repeat(1, 2)[:, None])
    # Too small ones go last, and then out; they overlap nothing, being nowhere. So do those that are no numbers, of a
    # run that diverged: they would end the process in the pooling.
    large = ((boxes[..., 2:] - boxes[..., :2]) >= least).all(2) & scores.isfinite()
    scores, boxes = torch.where(large, scores, -1), torch.where(large[..., None], boxes, 0)
    image = torch.arange(images, device=boxes.device)[:, None].expand_as(scores)
    kept = batched_nms(boxes.flatten(0, 1), scores.flatten(), (level * images + image).flatten(), nms_threshold)
    row = image.flatten()[kept]
    place = rank_in_group(row)
    # Those beyond the last place are put there and cut off.
    where = row, place.clamp_max(after)
    filled = boxes.new_zeros(images, after + 1, 4).index_put(where, boxes.flatten(0, 1)[kept])[:, :after]
    scored = scores.new_full((images, after + 1), -1).index_put(where, scores.flatten()[kept])[:, :after]
    return Proposals(filled, scored)
