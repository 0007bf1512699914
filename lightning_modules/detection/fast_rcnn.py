"""Fast R-CNN: Girshick, "Fast R-CNN", ICCV 2015.

The convolutions run once over the image. RoI pooling reduces the features of each proposal to one size, and fully
connected layers predict its class and box, trained jointly. The heads, their targets, loss and decoding are in
``components/roi_heads.py``; the options are those of `RoIStage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.components.external_proposals import inference_proposals, training_proposals
from lightning_modules.detection.two_stage import RoIStage


class FastRCNN(RoIStage):
    """Fast R-CNN (Girshick 2015), with external proposals.

    With VGG-16 and 20 classes it has 134,690,729 parameters. Proposals are part of the batch (``--data.proposals``); if
    there are none in inference, Selective Search computes them, about one second per image. Batch, predictions and
    metrics: see `Detector`.

    Args:
        weights: None to train from scratch; a name of torchvision's weights of the backbone: IMAGENET1K_V1 (the
            references start from such), IMAGENET1K_V2 (ResNets only) or DEFAULT, the newest; or a file of such weights
            or one of our checkpoints.
        **kwargs: see `RoIStage`. Its defaults are the paper's: 64 RoIs from each of two images.
    """

    def __init__(self, weights: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.load_pretrained(weights)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        boxes, valid = training_proposals(batch)
        maps, sizes = self.extract_features(batch["image"])
        return self.roi_losses(self.run_roi_heads(maps, sizes, boxes, valid, batch["target"]))

    def predict(
        self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        """See `VisionModule`; proposals are float (P, 4), xyxy, per image, or None for Selective Search."""
        given = [None] * len(images) if proposals is None else proposals
        return [self.predict_image(image[None], boxes) for image, boxes in zip(images, given, strict=True)]

    def predict_image(self, image: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        boxes, valid = inference_proposals(image, None if proposals is None else [proposals])
        maps, sizes = self.extract_features(image)
        return self.decode(self.run_roi_heads(maps, sizes, boxes, valid))[0]

    def predict_batch(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        return self.predict(batch["image"], batch.get("proposals"))
