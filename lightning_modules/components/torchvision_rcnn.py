"""Loading of torchvision's R-CNN weights."""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.components.backbones import Backbone, from_imagenet
from lightning_modules.components.pretrained import find_weights, load_weights

# Its names, the older release's among them, and ours.
TORCHVISIONS = {
    r"backbone\.fpn\.(\w+)\.(\d)\.(weight|bias)$": r"trunk.fpn.\1.\2.0.\3",
    r"backbone\.": "trunk.",
    r"rpn\.head\.conv\.(weight|bias)$": r"rpn.head.conv.0.0.\1",
    r"roi_heads\.box_head\.": "roi.head.",
    r"roi_heads\.box_predictor\.cls_score\.": "roi.classifier.",
    r"roi_heads\.box_predictor\.bbox_pred\.": "roi.regressor.",
    **{rf"roi_heads\.mask_head\.mask_fcn{i + 1}\.": f"mask.head.{i}.0." for i in range(4)},
    r"roi_heads\.mask_": "mask.",
    r"roi_heads\.keypoint_": "keypoint.",
}


def load_rcnn(
    network: nn.Module,
    system: Literal["maskrcnn", "keypointrcnn"],
    backbone: Backbone,
    batch_norm: bool,
    weights: str,
) -> None:
    """Loads torchvision's Mask or Keypoint R-CNN, ImageNet's weights, or a checkpoint of ours, a Faster R-CNN's too.

    Args:
        network: its other modules keep what they have where the file has nothing, or another number of classes.
        system: which of torchvision's.
        backbone, batch_norm: see `make_trunk`.
        weights: ``COCO_V1`` for torchvision's, else see `find_weights`.
    """
    name = backbone.removesuffix("_fpn") + ("_bn" if backbone == "vgg16" and batch_norm else "")
    branch = system.removesuffix("rcnn")
    heads: tuple[str, ...] = ("rpn", "roi", branch, "trunk.fpn")
    if weights.startswith("COCO_"):
        name, heads = f"{system}_{backbone}", ("roi.classifier", "roi.regressor", f"{branch}.predictor")

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = any(key.startswith("roi_heads.") for key in state)
        return from_torchvision(state) if theirs else from_imagenet(state, backbone)

    load_weights(network, find_weights(name, weights), name, *heads, convert=convert)


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the weights of torchvision's Mask, Keypoint or Faster R-CNN as ours, such that ours computes the same.

    - Its networks of COCO_V1 divide by the root of the variance with nothing added, ours add 1e-5: the factor that
      follows makes up for it.
    - Its anchors are centerd on the cells' corners, ours on their middles, half a stride off: of anchors whose sizes
      are eight strides a fixed part of their sides, which the offsets' bias takes. (It rounds their sides to pixels,
      which is left.)

    Args:
        state: name to tensor. Of the published file some names are of an older release.
    """
    renamed = {}
    for key, value in state.items():
        ours = next((re.sub(f"^{old}", new, key) for old, new in TORCHVISIONS.items() if re.match(old, key)), key)
        if key.endswith("running_var"):
            weight = key.replace("running_var", "weight")
            factor = ((value.double() + 1e-5) / value.double()).sqrt()
            renamed[ours.replace("running_var", "weight")] = (state[weight] * factor).to(value.dtype)
        if not key.endswith("num_batches_tracked"):
            renamed.setdefault(ours, value)
    bias = renamed.get("rpn.head.bbox_pred.bias")
    if bias is not None and len(bias) == 12:
        parts = [[math.sqrt(ratio) / 16, 1 / math.sqrt(ratio) / 16, 0, 0] for ratio in (0.5, 1.0, 2.0)]
        renamed["rpn.head.bbox_pred.bias"] = bias - torch.tensor(parts).flatten()
    return renamed
