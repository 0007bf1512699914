"""Pretrained weights of the R-CNN family: torchvision's classifiers and R-CNNs, and our own checkpoints."""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.components.backbones import Backbone
from lightning_modules.components.pretrained import find_weights, load_weights

# Torchvision's names, those of an older release included, and ours.
TORCHVISION_NAMES = {
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
    backbone: Backbone,
    batch_norm: bool,
    weights: str,
    branch: Literal["mask", "keypoint"] | None = None,
) -> None:
    """Load ImageNet weights, torchvision's Mask or Keypoint R-CNN, or one of our checkpoints.

    Modules that the file does not contain keep their weights, as do layers for another number of classes.

    Args:
        network: has ``trunk`` and, depending on the system, ``rpn``, ``roi`` and the branch.
        backbone: see `make_trunk`.
        batch_norm: see `make_trunk`.
        weights: ``COCO_V1`` for torchvision's R-CNN with this branch, else see `find_weights`.
        branch: name of the third branch, if there is one.
    """
    name = backbone.removesuffix("_fpn") + ("_bn" if backbone == "vgg16" and batch_norm else "")
    heads = ["rpn", "roi", "trunk.fpn", *([branch] if branch else [])]
    if branch and weights.startswith("COCO_"):
        name, heads = f"{branch}rcnn_{backbone}", ["roi.classifier", "roi.regressor", f"{branch}.predictor"]

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        is_torchvision_rcnn = any(key.startswith("roi_heads.") for key in state)
        return from_torchvision(state) if is_torchvision_rcnn else from_imagenet(state, backbone)

    load_weights(network, find_weights(name, weights), name, *heads, convert=convert)


def from_imagenet(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Rename the weights of torchvision's classifiers; our own weights keep their names.

    Args:
        state: weights by name.
        backbone: see `make_trunk`.
    """
    if any(key.startswith("trunk.") for key in state):
        return state
    if backbone == "vgg16":
        prefixes = {"features": "trunk", "classifier.0": "roi.head.fc6", "classifier.3": "roi.head.fc7"}
    else:
        is_pyramid = backbone.endswith("_fpn")
        trunk = "trunk.body" if is_pyramid else "trunk"
        prefixes = {name: f"{trunk}.{name}" for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")}
        prefixes |= {} if is_pyramid else {"layer4": "roi.head.layer4"}
    renamed = {}
    for key, value in state.items():
        name = next((f"{new}{key[len(old) :]}" for old, new in prefixes.items() if key.startswith(f"{old}.")), None)
        # Frozen batch normalization has no counter. Torchvision's VGG-16 of features alone has nan in fc6 and fc7.
        if name is not None and not key.endswith("num_batches_tracked") and value.isfinite().all():
            renamed[name] = value
    return renamed


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and adapt the weights of torchvision's Mask, Keypoint or Faster R-CNN; the outputs stay the same.

    - The networks of COCO_V1 have a batch normalization epsilon of 0, ours 1e-5: rescale its weight.
    - Torchvision centers anchors on the corners of cells, ours are half a stride further. For anchors of eight strides
      that is a constant fraction of their sides: correct the bias of the box deltas. Torchvision also rounds the sides
      of anchors to pixels, which is not corrected.

    Args:
        state: weights by name. The published file has some names of an older release.
    """
    renamed = {}
    for key, value in state.items():
        name = next((re.sub(f"^{old}", new, key) for old, new in TORCHVISION_NAMES.items() if re.match(old, key)), key)
        if key.endswith("running_var"):
            weight = key.replace("running_var", "weight")
            factor = ((value.double() + 1e-5) / value.double()).sqrt()
            renamed[name.replace("running_var", "weight")] = (state[weight] * factor).to(value.dtype)
        if not key.endswith("num_batches_tracked"):
            renamed.setdefault(name, value)
    bias = renamed.get("rpn.head.bbox_pred.bias")
    if bias is not None and len(bias) == 12:
        shift = [[math.sqrt(ratio) / 16, 1 / math.sqrt(ratio) / 16, 0, 0] for ratio in (0.5, 1.0, 2.0)]
        renamed["rpn.head.bbox_pred.bias"] = bias - torch.tensor(shift).flatten()
    return renamed
