"""DeepLab v1 and v2: Chen, Papandreou, Kokkinos, Murphy and Yuille, "Semantic Image Segmentation with Deep
Convolutional Nets and Fully Connected CRFs", ICLR 2015, and "DeepLab: Semantic Image Segmentation with Deep
Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", PAMI 2018.

A classifier's last strides are left out and the convolutions after them dilated, so that it has a score for every
eighth pixel and sees as much as before; bilinear interpolation does the rest, and a CRF the edges.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.image_batches import pad_to_multiple, require_equal_size
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.vgg import conv_relu, vgg16_plan
from lightning_modules.segmentation.crf import DEEPLAB
from lightning_modules.segmentation.dilated_resnet import DilatedResNet, freeze_batch_norm, load_resnet
from lightning_modules.segmentation.metrics import segmentation_metrics
from lightning_modules.segmentation.scores import CROP_ADVICE, VOID, cross_entropy, resize, sizes_of

Variant = Literal["largefov", "aspp", "resnet101"]
CRF = Literal["largefov", "vgg16", "resnet101"]

# --- network --------------------------------------------------------------------------------------------------------


class DeepLabNetwork(nn.Module):
    """Normalized images float (B,3,H,W) to logits of every eighth pixel, see `forward`.

    Parameters, for 21 classes: largefov 20,505,429; aspp 37,877,652; resnet101 44,048,532.

    Args:
        variant: ``largefov`` is v1's on VGG16, with one branch of dilation 12; ``aspp`` v2's with four, ASPP-L;
            ``resnet101`` v2's, with four scores of dilations 6 to 24.
        num_classes: C.
        width: multiplies the channels of all layers but the scores.
        batch_norm: after each convolution of VGG16 and of its branches.
        scales: of the images that are looked at, the first one 1. The weights are shared.
        frozen_bn: see `freeze_batch_norm`.
    """

    def __init__(
        self,
        variant: Variant = "resnet101",
        num_classes: int = 21,
        width: float = 1.0,
        batch_norm: bool = False,
        scales: Sequence[float] = (1.0,),
        frozen_bn: bool = False,
    ) -> None:
        super().__init__()
        self.scales, self.frozen_bn = tuple(scales), frozen_bn
        rates = [12] if variant == "largefov" else [6, 12, 18, 24]
        self.features: nn.Sequential
        if variant == "resnet101":
            self.features = DilatedResNet("resnet101", width, stride=8, early=True)
            branches: list[nn.Module] = [nn.Identity() for _ in rates]
            score = [nn.Conv2d(self.features.channels, num_classes, 3, padding=r, dilation=r) for r in rates]
        else:
            self.features = self._make_vgg16(width, batch_norm)
            if variant == "largefov":
                self.features.append(nn.AvgPool2d(3, 1, 1))
            into, out = (max(1, round(c * width)) for c in (512, 1024))
            branches = [self._make_branch(into, out, rate, batch_norm) for rate in rates]
            score = [nn.Conv2d(out, num_classes, 1) for _ in rates]
            for layer in (*self.features.modules(), *(m for branch in branches for m in branch.modules())):
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    assert layer.bias is not None
                    nn.init.zeros_(layer.bias)
        self.branches, self.score = nn.ModuleList(branches), nn.ModuleList(score)
        for layer in score:
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.train()

    @staticmethod
    def _make_vgg16(width: float, batch_norm: bool) -> nn.Sequential:
        """Numbered as torchvision's: pools of 3x3, the last two without a stride, and dilation after them."""
        plan = vgg16_plan(width)
        layers = make_layers(plan, batch_norm)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        for i in pools:
            layers[i] = nn.MaxPool2d(3, 1 if i in pools[3:] else 2, 1)
        for layer in layers[pools[3] :]:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (2, 2)
        return layers

    @staticmethod
    def _make_branch(into: int, out: int, rate: int, batch_norm: bool) -> nn.Module:
        # Every element is dropped by itself, as in Caffe, not whole channels.
        fc6 = conv_relu(into, out, 3, batch_norm, padding=rate, dilation=rate)
        fc7 = conv_relu(out, out, 1, batch_norm)
        layers = {"fc6": nn.Sequential(*fc6, nn.Dropout(0.5)), "fc7": nn.Sequential(*fc7, nn.Dropout(0.5))}
        return nn.Sequential(OrderedDict(layers))

    def train(self, mode: bool = True) -> DeepLabNetwork:
        super().train(mode)
        if self.frozen_bn:
            freeze_batch_norm(self)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits float32 (B,C,h,w) of each scale, then, of several, the greatest at the first's cells.

        Cell (i, j) is at pixel (8 i, 8 j) of the image at its scale; the last ones lie on the last pixels of the image
        after `pad_to_multiple`.
        """
        x = pad_to_multiple(x, 32, offset=1)
        maps = []
        for scale in self.scales:
            height, width = (round((side - 1) * scale) + 1 for side in x.shape[2:])
            # Corners on corners, as Caffe's Interp: 321 pixels become 241 and 161.
            maps.append(self.scores(interpolate(x, (height, width))))
        if len(maps) == 1:
            return maps
        cells = (maps[0].shape[2], maps[0].shape[3])
        return [*maps, torch.stack([interpolate(m, cells) for m in maps]).amax(0)]

    def scores(self, x: Tensor) -> Tensor:
        """Logits float32 (B,C,h,w) of images (B,3,8h-7,8w-7): the sum of the branches'."""
        x = self.features(x)
        each = [score(branch(x)).float() for branch, score in zip(self.branches, self.score, strict=True)]
        return torch.stack(each).sum(0)

    def of_pixels(self, x: Tensor) -> Tensor:
        """Logits float32 (B,C,H,W)."""
        return to_pixels(self(x)[-1], x.shape[2:])


def interpolate(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners on corners: (B,C,h,w) to (B,C,height,width)."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


def to_pixels(scores: Tensor, size: Sequence[int], step: int = 32) -> Tensor:
    """Scores (B,C,h,w) of the cells of an image that went through `pad_to_multiple`, at its pixels: (B,C,height,width)."""
    height, width = size
    full = (height + (1 - height) % step, width + (1 - width) % step)
    return interpolate(scores, full)[:, :, :height, :width]


# --- loss -----------------------------------------------------------------------------------------------------------


def at_cells(mask: Tensor, size: Sequence[int]) -> Tensor:
    """The ids of the pixels on which cells lie, corners on corners: int64 (B,H,W) to (B,h,w).

    Of 321 pixels, for 41 cells, every eighth: ``mask[:, ::8, ::8]``.
    """
    rows, columns = (
        torch.linspace(0, side - 1, cells, dtype=torch.float64, device=mask.device).round().long()
        for side, cells in zip(mask.shape[1:], size, strict=True)
    )
    return mask[:, rows[:, None], columns]


def deeplab_loss(outputs: Sequence[Tensor], mask: Tensor, scales: Sequence[float]) -> dict[str, Tensor]:
    """The cross entropy of each scale, and that of their maximum, all with weight 1 (DeepLab 2018, section 4.1.2).

    Args:
        outputs: see `DeepLabNetwork.forward`.
        mask: int64 (B,H,W), 255 = void, as it went into the network.
        scales: those of the outputs.
    """
    mask = pad_to_multiple(mask, 32, offset=1, value=VOID)
    names = [f"scale_{scale:g}" for scale in scales] + ["maximum"] if len(scales) > 1 else ["cross_entropy"]
    return {
        name: cross_entropy(scores, at_cells(mask, scores.shape[2:]))
        for name, scores in zip(names, outputs, strict=True)
    }


# --- decoding -------------------------------------------------------------------------------------------------------


class Decoder:
    """From images to maps of classes: probabilities averaged over scales and reflections, then, if named, a CRF.

    Args:
        scales: factors by which the images are scaled; [1] takes them as they are.
        flip: look at each one's reflection too.
        crf: name of the authors' settings, see `crf.DEEPLAB`; None for none.
    """

    def __init__(self, scales: Sequence[float] = (1.0,), flip: bool = False, crf: CRF | None = None) -> None:
        if not scales or min(scales) <= 0:
            raise UserError(f"eval_scales: expected one or more factors above 0, found {list(scales)}")
        if crf is not None and crf not in DEEPLAB:
            raise UserError(f"crf: expected one of {', '.join(DEEPLAB)}, found {crf}")
        self.scales, self.flip = tuple(scales), flip
        self.crf = None if crf is None else DEEPLAB[crf]

    def __call__(
        self,
        network: Callable[[Tensor], Tensor],
        preprocess: Callable[[Tensor], Tensor],
        images: Tensor | list[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """The most probable class of each pixel: int64 (h,w) an image.

        Args:
            network: normalized images float (B,3,H,W) to logits float32 (B,C,H,W).
            preprocess: uint8 images to normalized ones.
            images: uint8 (B,3,H,W) or a list of (3,H,W).
            sizes: (height, width) to give each map; None for the images' own.

        Raises:
            ValueError: a CRF is asked for, and an image has not the size that its map is to have.
        """
        sizes = [(image.shape[1], image.shape[2]) for image in images] if sizes is None else sizes
        pairs = list(zip(images, sizes, strict=True))
        wrong = [f"{i.shape[2]}x{i.shape[1]} of {w}x{h}" for i, (h, w) in pairs if i.shape[1:] != (h, w)]
        if self.crf is not None and wrong:
            raise UserError(
                f"crf: expected images at their own size, found {wrong[0]}: set --data.eval_image_size null, and "
                "--model.eval_scales if the network is to see them smaller"
            )
        if isinstance(images, Tensor):
            probabilities = self.probabilities(network, preprocess(images), sizes)
        else:
            probabilities = [self.probabilities(network, preprocess(i[None]), [size])[0] for i, size in pairs]
        if self.crf is not None:
            probabilities = [self.crf(p, image) for p, image in zip(probabilities, images, strict=True)]
        return [p.argmax(0) for p in probabilities]

    def probabilities(
        self, network: Callable[[Tensor], Tensor], pixels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The mean of the softmaxes: float32 (C,h,w) an image, of normalized ones (B,3,H,W); (h,w) from ``sizes``."""
        height, width = pixels.shape[2:]
        found: list[list[Tensor]] = [[] for _ in sizes]
        for scale, reflected in product(self.scales, (False, True) if self.flip else (False,)):
            sides = (max(1, round(height * scale)), max(1, round(width * scale)))
            scaled = pixels if scale == 1 else F.interpolate(pixels, sides, mode="bilinear", antialias=True)
            logits = network(scaled.flip(3)).flip(3) if reflected else network(scaled)
            for i, size in enumerate(sizes):
                found[i].append(resize(logits[i], size).softmax(0))
        return [torch.stack(each).mean(0) if len(each) > 1 else each[0] for each in found]


# --- pretrained weights ---------------------------------------------------------------------------------------------


def from_vgg16(state: dict[str, Tensor], branches: int) -> dict[str, Tensor]:
    """Names and shapes torchvision's VGG16 as ours; ours keep their names.

    Every branch begins with fc6 and fc7, of which every fourth unit is taken, and of fc6's 7x7 places every third.

    Args:
        state: name to tensor.
        branches: how many there are.
    """
    if any(key.startswith("score.") for key in state):
        return state
    ours = {key: value for key, value in state.items() if key.startswith("features.")}
    # Torchvision's file of features alone has no numbers in the classifier.
    if "classifier.0.weight" in state and state["classifier.0.weight"].isfinite().all():
        for i in range(branches):
            ours[f"branches.{i}.fc6.0.weight"] = state["classifier.0.weight"].unflatten(1, (-1, 7, 7))[::4, :, ::3, ::3]
            ours[f"branches.{i}.fc6.0.bias"] = state["classifier.0.bias"][::4]
            ours[f"branches.{i}.fc7.0.weight"] = state["classifier.3.weight"][::4, ::4, None, None]
            ours[f"branches.{i}.fc7.0.bias"] = state["classifier.3.bias"][::4]
    return ours


# --- module ---------------------------------------------------------------------------------------------------------


class DeepLab(VisionModule):
    """DeepLab v1 and v2. Batch: see segmentation in the batch contract. Predictions: a map of class ids int64 (h,w) an
    image.

    Metrics: see `SegmentationMetrics`; images are scored at their own size, to which the scores are resized.

    Args:
        variant, width, batch_norm, frozen_bn: see `DeepLabNetwork`.
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        scales: of the images that the network looks at, in training as in evaluation, the first one 1; v2's ResNet
            has [1, 0.75, 0.5], see `deeplab_loss`.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights of VGG16 or ResNet-101; or a
            file: of these, or one of our checkpoints.
        head_lr_scale: how many times faster the scores learn. Biases learn at twice the rate and do not decay.
        eval_scales, eval_flip, crf: see `Decoder`; a checkpoint can be tested with any.
        optimizer: see `VisionModule`; the authors' for ResNet-101. VGG16 has a rate of 1e-3.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/miou", "max")

    def __init__(
        self,
        variant: Variant = "resnet101",
        num_classes: int = 21,
        class_names: list[str] | None = None,
        width: float = 1.0,
        batch_norm: bool = False,
        scales: Sequence[float] = (1.0,),
        frozen_bn: bool = False,
        weights: str | None = None,
        head_lr_scale: float = 10.0,
        eval_scales: Sequence[float] = (1.0,),
        eval_flip: bool = False,
        crf: CRF | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(
            params, lr=2.5e-4, momentum=0.9, weight_decay=5e-4
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if variant not in ("largefov", "aspp", "resnet101"):
            raise UserError(f"variant: expected largefov, aspp or resnet101, found {variant}")
        if not scales or scales[0] != 1 or min(scales) <= 0 or len(set(scales)) != len(scales):
            raise UserError(f"scales: expected 1 and then other factors above 0, found {list(scales)}")
        self.num_classes, self.class_names, self.head_lr_scale = num_classes, class_names, head_lr_scale
        self.network = DeepLabNetwork(variant, num_classes, width, batch_norm, scales, frozen_bn)
        self.decoder = Decoder(eval_scales, eval_flip, crf)
        if weights is not None and variant == "resnet101":
            load_resnet(self.network, "resnet101", weights, "score")
        elif weights is not None:
            name = "vgg16_bn" if batch_norm else "vgg16"
            count = len(self.network.branches)
            path = find_weights(name, weights)
            load_weights(self.network, path, name, "branches", "score", convert=lambda state: from_vgg16(state, count))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        outputs = self.network(self.preprocess(require_equal_size(batch["image"], CROP_ADVICE)))
        return deeplab_loss(outputs, batch["mask"], self.network.scales)

    def predict(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        return self.decoder(self.network.of_pixels, self.preprocess, images)

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        return self.decoder(self.network.of_pixels, self.preprocess, batch["image"], sizes_of(batch))

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        below = nn.ModuleList([self.network.features, self.network.branches])
        head = [
            {**group, "lr_scale": self.head_lr_scale * group.get("lr_scale", 1.0)}
            for group in caffe_groups(self.network.score)
        ]
        return [*caffe_groups(below), *head]
