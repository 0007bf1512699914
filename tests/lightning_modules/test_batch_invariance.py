"""A prediction does not depend on the other images of its batch, for all systems that accept images of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.detection.voc import VOCDetection
from datamodules.synthetic.voc import write_voc
from lightning_modules.base import VisionModule
from lightning_modules.detection.fast_rcnn import FastRCNN
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.overfeat import OverFeat
from lightning_modules.detection.rcnn import RCNN
from lightning_modules.detection.rpn import RPN
from lightning_modules.detection.sliding_window import SlidingWindow
from lightning_modules.pose.keypoint_rcnn import KeypointRCNN
from lightning_modules.segmentation.deconvnet import DeconvNet
from lightning_modules.segmentation.deeplab import DeepLab
from lightning_modules.segmentation.deeplab_v3 import DeepLabV3
from lightning_modules.segmentation.encoder_decoder import EncoderDecoder
from lightning_modules.segmentation.fcn import FCN
from lightning_modules.segmentation.mask_rcnn import MaskRCNN
from lightning_modules.segmentation.patch_classifier import PatchClassifier

SIZES = ((64, 96), (80, 50), (33, 100), (64, 96))
NARROW: dict[str, Any] = {"width_multiplier": 0.05, "batch_norm": True}
PROPOSALS: dict[str, Any] = {
    "anchor_sizes": (16, 32),
    "rpn_min_size": 2.0,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 20,
}
PYRAMID: dict[str, Any] = {**PROPOSALS, "backbone": "resnet50_fpn", "anchor_sizes": (32, 64, 128, 256, 512)}
SYSTEMS: dict[str, Callable[[], VisionModule]] = {
    "RPN": lambda: RPN(**NARROW, **PROPOSALS),
    "FasterRCNN": lambda: FasterRCNN(num_classes=3, **NARROW, **PROPOSALS),
    "FasterRCNN_fpn": lambda: FasterRCNN(num_classes=3, width_multiplier=0.05, **PYRAMID),
    "MaskRCNN": lambda: MaskRCNN(num_classes=3, backbone="vgg16", **NARROW, **PROPOSALS),
    "MaskRCNN_fpn": lambda: MaskRCNN(num_classes=3, width_multiplier=0.05, **PYRAMID),
    "KeypointRCNN": lambda: KeypointRCNN(backbone="vgg16", **NARROW, **PROPOSALS),
    "FastRCNN": lambda: FastRCNN(num_classes=3, **NARROW),
    "RCNN": lambda: RCNN(num_classes=3, backbone="small", crop_size=32, context=4),
    "SlidingWindow": lambda: SlidingWindow(num_classes=3, window_size=32, window_sizes=(32, 64), width_multiplier=0.1),
    "OverFeat": lambda: OverFeat(num_classes=3, scales=(231, 260), width_multiplier=0.02, score_threshold=0.1),
    "PatchClassifier": lambda: PatchClassifier(num_classes=3, width_multiplier=0.1, patch_size=24),
    "EncoderDecoder": lambda: EncoderDecoder(num_classes=3, channels=(8, 8, 8)),
    "FCN": lambda: FCN(num_classes=3, **NARROW),
    "DeconvNet": lambda: DeconvNet(num_classes=3, width_multiplier=0.02, inference="image"),
    "DeepLab": lambda: DeepLab(num_classes=3, variant="largefov", eval_flip=True, **NARROW),
    "DeepLab_v2": lambda: DeepLab(num_classes=3, width_multiplier=0.05, eval_flip=True),
    "DeepLabV3": lambda: DeepLabV3(num_classes=3, backbone="resnet18", multi_grid=(1, 2), width_multiplier=0.1),
}


def random_proposals(height: int, width: int) -> Tensor:
    corners = torch.rand(20, 2, 2).sort(1).values * torch.tensor([width - 8.0, height - 8.0])
    return torch.cat([corners[:, 0], corners[:, 1] + 8], 1)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
        return
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SYSTEMS)
def test_predictions_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = SYSTEMS[name]().eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES]
    options: list[dict[str, Any]] = [{}] * len(images)
    together: dict[str, Any] = {}
    if name in ("FastRCNN", "RCNN"):
        proposals = [random_proposals(*size) for size in SIZES]
        options, together = [{"proposals": [p]} for p in proposals], {"proposals": proposals}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        batch = module.predict(images, **together)
        single = [module.predict([image], **option)[0] for image, option in zip(images, options, strict=True)]
    assert len(batch) == len(single)
    for a, b in zip(batch, single, strict=True):
        assert_equal(a, b)
    found = [len(a["boxes"]) if isinstance(a, dict) else a.numel() for a in batch]
    assert all(found), found


def test_metrics_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """The recall of an untrained network, with its many proposals, has digits that differ for any other proposal."""
    write_voc(str(tmp_path), classes=3, train=2, val=6, size=64)
    results = []
    for batch_size in (1, 2, 5):
        torch.manual_seed(0)
        module = RPN(**NARROW, **{**PROPOSALS, "rpn_post_nms_top_n_test": 300})
        data = VOCDetection(
            str(tmp_path),
            image_size=(64, 100),
            eval_batch_size=batch_size,
            num_workers=0,
            val=["VOC2007/test"],
        )
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path))
        (values,) = trainer.validate(module, data, verbose=False)
        results.append(values)
    assert 0.1 < results[0]["val/average_recall_300"] < 0.9
    assert results[0] == results[1] == results[2]
