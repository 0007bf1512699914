"""DeepLabv3: Chen, Papandreou, Schroff and Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.

A ResNet whose last blocks are dilated, and on top of it convolutions of several dilations side by side with the mean of
the whole image, each normalized, joined by a further convolution. Without a CRF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.image_batches import pad_to_multiple, require_equal_size
from lightning_modules.segmentation.deeplab import CRF, Decoder, to_pixels
from lightning_modules.segmentation.dilated_resnet import DilatedResNet, ResNet, freeze_batch_norm, load_resnet
from lightning_modules.segmentation.metrics import segmentation_metrics
from lightning_modules.segmentation.scores import CROP_ADVICE, cross_entropy, sizes_of

# --- network --------------------------------------------------------------------------------------------------------


def unit(into: int, out: int, rate: int = 0) -> nn.Sequential:
    """A convolution, 3x3 of dilation ``rate`` or, without one, 1x1; batch normalization; ReLU."""
    kernel = 3 if rate else 1
    conv = nn.Conv2d(into, out, kernel, padding=rate, dilation=max(1, rate), bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (section 3.3): float (B,into,h,w) to (B,out,h,w).

    Args:
        into, out: channels.
        rates: dilations of the 3x3 convolutions.
    """

    def __init__(self, into: int, out: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([unit(into, out), *(unit(into, out, rate) for rate in rates)])
        self.pooling = unit(into, out)
        self.project = unit((len(rates) + 2) * out, out)
        # Not in the paper, but in the authors' code (tensorflow/models, deeplab/model.py).
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self.pooling[1].training:
            raise UserError(
                "image: expected 2 or more images to train on, found 1, of which image pooling leaves one value a "
                "channel and batch normalization no variance: set --data.batch_size and --data.drop_last true, or "
                "--model.frozen_bn true"
            )
        pooled = self.pooling(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        return self.dropout(self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1)))


class DeepLabV3Network(nn.Module):
    """Normalized images float (B,3,H,W) to logits float32 (B,C,H,W). With the defaults 58,040,661 parameters.

    Args:
        backbone: see `DilatedResNet`.
        num_classes: C.
        width: multiplies the channels of all layers but the last.
        output_stride: pixels from one cell of the map to the next. At 8 the rates are doubled, so that a network that
            was trained at 16 can be used at 8.
        multi_grid: see `DilatedResNet`.
        rates: dilations of the 3x3 convolutions at an output stride of 16.
        frozen_bn: see `freeze_batch_norm`.
    """

    def __init__(
        self,
        backbone: ResNet = "resnet101",
        num_classes: int = 21,
        width: float = 1.0,
        output_stride: Literal[8, 16] = 16,
        multi_grid: Sequence[int] = (1, 2, 4),
        rates: Sequence[int] = (6, 12, 18),
        frozen_bn: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.frozen_bn = output_stride, frozen_bn
        self.features = DilatedResNet(backbone, width, output_stride, multi_grid)
        channels = max(1, round(256 * width))
        self.aspp = ASPP(self.features.channels, channels, [rate * 16 // output_stride for rate in rates])
        self.score = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        assert self.score.bias is not None
        nn.init.zeros_(self.score.bias)
        self.train()

    def train(self, mode: bool = True) -> DeepLabV3Network:
        super().train(mode)
        if self.frozen_bn:
            freeze_batch_norm(self)
        return self

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(self.aspp(self.features(pad_to_multiple(x, self.stride, offset=1))))
        return to_pixels(scores.float(), x.shape[2:], self.stride)


# --- module ---------------------------------------------------------------------------------------------------------


class DeepLabV3(VisionModule):
    """DeepLabv3. Batch: see segmentation in the batch contract. Predictions: a map of class ids int64 (h,w) an image.

    Metrics: see `SegmentationMetrics`; images are scored at their own size, to which the scores are resized.

    Args:
        backbone, width, output_stride, multi_grid, rates, frozen_bn: see `DeepLabV3Network`. The paper trains at 16 and
            then, with frozen batch normalization, at 8, at which it tests.
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file: of
            these, or the checkpoint of the first stage.
        eval_scales, eval_flip, crf: see `Decoder`; a checkpoint can be tested with any.
        optimizer: see `VisionModule`; the paper's rate.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/miou", "max")

    def __init__(
        self,
        backbone: ResNet = "resnet101",
        num_classes: int = 21,
        class_names: list[str] | None = None,
        width: float = 1.0,
        output_stride: Literal[8, 16] = 16,
        multi_grid: Sequence[int] = (1, 2, 4),
        rates: Sequence[int] = (6, 12, 18),
        frozen_bn: bool = False,
        weights: str | None = None,
        eval_scales: Sequence[float] = (1.0,),
        eval_flip: bool = False,
        crf: CRF | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=7e-3, momentum=0.9, weight_decay=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if not rates or min(rates) < 1:
            raise UserError(f"rates: expected one or more dilations of 1 or more, found {list(rates)}")
        self.num_classes, self.class_names = num_classes, class_names
        self.network = DeepLabV3Network(backbone, num_classes, width, output_stride, multi_grid, rates, frozen_bn)
        self.decoder = Decoder(eval_scales, eval_flip, crf)
        if weights is not None:
            load_resnet(self.network, backbone, weights, "aspp", "score")

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        # The scores are enlarged, not the truth reduced (section 4.1).
        return {
            "cross_entropy": cross_entropy(
                self.network(self.preprocess(require_equal_size(batch["image"], CROP_ADVICE))), batch["mask"]
            )
        }

    def predict(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        return self.decoder(self.network, self.preprocess, images)

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        return self.decoder(self.network, self.preprocess, batch["image"], sizes_of(batch))

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])
