"""The patch classifier: the class of each pixel is what a classifier says of the patch that is centerd on it.

The lecture's first idea of semantic segmentation, as in Farabet, Couprie, Najman and LeCun, "Learning Hierarchical
Features for Scene Labeling", PAMI 2013, and Pinheiro and Collobert, "Recurrent Convolutional Neural Networks for Scene
Labeling", ICML 2014. First run naively, patch by patch; then its fully connected layers become convolutions, and one
pass over the image gives every patch's answer, since neighboring patches share their features.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory, VisionModule
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.vgg import vgg16_plan
from lightning_modules.segmentation.metrics import segmentation_metrics
from lightning_modules.segmentation.scores import CROP_ADVICE, VOID, cross_entropy, of_each, resize, sizes_of, to_maps

Backbone = Literal["small", "vgg16"]
Inference = Literal["convolutional", "patches"]

# --- network --------------------------------------------------------------------------------------------------------

# (kernel, channels) of the small network's convolutions; after each batch normalization, ReLU and max pooling by 2.
# None is padded, and no pixel of a patch is left over: only then is a dense pass the same as patches.
SMALL = ((5, 32), (3, 64), (3, 128))


class PatchNetwork(nn.Module):
    """A classifier of patches: convolutions, then fully connected layers with dropout between them.

    Args:
        num_classes: C.
        backbone: ``small``, three convolutions without padding and one hidden layer, every 8 pixels; or ``vgg16``,
            torchvision's, every 32 pixels, of 134,346,581 parameters with 21 classes and patches of 224.
        patch: side in pixels of what it sees. A multiple of 8 from 24 on for ``small``, 64 where None; of 32 for
            ``vgg16``, 224 where None.
        width: multiplies the channels and hidden units.
    """

    def __init__(
        self, num_classes: int = 21, backbone: Backbone = "small", patch: int | None = None, width: float = 1.0
    ) -> None:
        super().__init__()
        if backbone not in ("small", "vgg16"):
            raise UserError(f"backbone: expected small or vgg16, found {backbone}")
        self.patch, self.stride, least = (patch or 64, 8, 24) if backbone == "small" else (patch or 224, 32, 32)
        if self.patch < least or self.patch % self.stride:
            raise UserError(
                f"patch: expected {least} or more, a multiple of {self.stride} pixels, for {backbone}, found {patch}"
            )
        if backbone == "small":
            modules: list[nn.Module] = []
            channels, self.side = 3, self.patch
            for kernel, out in SMALL:
                out = max(1, round(out * width))
                modules += [nn.Conv2d(channels, out, kernel, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                modules.append(nn.MaxPool2d(2))
                channels, self.side = out, (self.side - kernel + 1) // 2
            self.features, hidden = nn.Sequential(*modules), [256]
        else:
            plan = vgg16_plan(width)
            self.features, hidden = make_layers(plan), [4096, 4096]
            channels, self.side = int(plan[-2]), self.patch // self.stride
        layers: list[nn.Module] = []
        units = channels * self.side**2
        for out in (max(1, round(out * width)) for out in hidden):
            layers += [nn.Linear(units, out), nn.ReLU(inplace=True), nn.Dropout(0.5)]
            units = out
        last = nn.Linear(units, num_classes)
        self.classifier = nn.Sequential(*layers, last)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(last.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized patches float (N,3,patch,patch) to logits (N,C)."""
        return self.classifier(self.features(x).flatten(1))

    def dense(self, x: Tensor) -> Tensor:
        """Normalized images float (N,3,H,W) to logits (N,C,rows,columns), of a patch every `stride` pixels.

        The same weights: a fully connected layer upon a map of side x side is a convolution with that kernel, and those
        that follow are convolutions 1x1. Of VGG16 it is not what the patches alone give: within the image its layers
        see a patch's surroundings, where a patch that is cut out has zeros.
        """
        x, side = self.features(x), self.side
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                x, side = F.conv2d(x, layer.weight.unflatten(1, (-1, side, side)), layer.bias), 1
            else:
                x = layer(x)
        return x


def finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the classifier of torchvision's file of features alone, whose weights are no numbers."""
    return {k: v for k, v in state.items() if not k.startswith("classifier.") or v.isfinite().all()}


# --- patches --------------------------------------------------------------------------------------------------------


def pad(images: Tensor, patch: int, stride: int) -> Tensor:
    """Surrounds normalized images (B,3,H,W) with 0, the mean color, such that the patches' grid fits exactly.

    The grid has ceil(H / stride) rows and ceil(W / stride) columns; place (i, j) stands for the cell of stride x stride
    pixels that begins at (stride * i, stride * j), and its patch is centerd on the cell's middle pixel, at stride // 2
    from there. The center of a patch is its pixel patch // 2, each way.
    """
    before = patch // 2 - stride // 2
    ends = [-(-size // stride) * stride - stride + patch - before - size for size in images.shape[2:]]
    return F.pad(images, (before, ends[1], before, ends[0]))


def patches_around(images: Tensor, patch: int, stride: int) -> Tensor:
    """The patches of the grid that `pad` describes, (B,3,rows,columns,patch,patch): a view, in which they overlap."""
    return pad(images, patch, stride).unfold(2, patch, stride).unfold(3, patch, stride)


def draw_centers(mask: Tensor, count: int, balanced: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels to train on, drawn from each image without replacement, from torch's default generator.

    Args:
        mask: int64 (B,H,W), 255 = void, which is drawn only where an image has fewer pixels than ``count`` beside.
        count: n, pixels of each image, at most all of them.
        balanced: draw the classes of an image about equally often; else every pixel has the same chance.

    Returns:
        Their rows, columns and labels, int64 (B,n).
    """
    ids = mask.flatten(1)
    # The order in which clocks ring: with rates r, the first is pixel i with the probability r_i / sum r.
    times = torch.empty(ids.shape, device=mask.device).exponential_()
    if balanced:
        pixels = torch.zeros(len(ids), VOID + 1, device=mask.device).scatter_add_(1, ids, torch.ones_like(times))
        times = times * pixels.gather(1, ids)
    times = times.masked_fill(ids == VOID, torch.inf)
    index = times.topk(min(count, ids.shape[1]), largest=False).indices
    return index // mask.shape[2], index % mask.shape[2], ids.gather(1, index)


# --- decoding -------------------------------------------------------------------------------------------------------

BATCH = 64  # patches at a time


def classify_each_patch(network: PatchNetwork, images: Tensor, stride: int) -> Tensor:
    """The naive way: every patch of the grid is cut out and classified by itself.

    Args:
        network: of patches.
        images: normalized float (B,3,H,W).
        stride: of the grid, see `pad`.

    Returns:
        Logits (B,C,rows,columns).
    """
    patches = patches_around(images, network.patch, stride)
    image, rows, columns = patches.shape[0], *patches.shape[2:4]
    places = torch.arange(image * rows * columns, device=images.device)
    parts = [network(patches[i // (rows * columns), :, i // columns % rows, i % columns]) for i in places.split(BATCH)]
    return torch.cat(parts).view(image, rows, columns, -1).permute(0, 3, 1, 2)


def classify_densely(network: PatchNetwork, images: Tensor, stride: int) -> Tensor:
    """The same in one pass, and where the grid is finer than the network's, in as many as it has offsets.

    Args:
        network: of patches.
        images: normalized float (B,3,H,W).
        stride: of the grid, see `pad`; it divides the network's.

    Returns:
        Logits (B,C,rows,columns).
    """
    padded, finer = pad(images, network.patch, stride), network.stride // stride
    rows, columns = (-(-size // stride) for size in images.shape[2:])
    parts = {}
    for y, x in itertools.product(range(min(finer, rows)), range(min(finer, columns))):
        parts[y, x] = network.dense(padded[:, :, y * stride :, x * stride :])
    if finer == 1:
        return parts[0, 0]
    result = parts[0, 0].new_empty(*parts[0, 0].shape[:2], rows, columns)
    for (y, x), part in parts.items():
        result[:, :, y::finer, x::finer] = part
    return result


# --- module ---------------------------------------------------------------------------------------------------------


class PatchClassifier(VisionModule):
    """The patch classifier. Batch: see segmentation in the batch contract, images of one size to train on.

    Predictions: a map of class ids int64 (h,w) an image. Metrics: see `SegmentationMetrics`; images are scored at
    their own size, to which the scores are resized.

    Trained on patches whose centers are drawn anew from each image, with the class of the center's pixel; what lies
    beyond an image has the mean color.

    Args:
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        backbone, patch, width: see `PatchNetwork`.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for VGG16; or a file of these or
            a checkpoint of ours, whose last layer may have other classes.
        patches_per_image: patches of each image to train on.
        balanced: draw the classes of an image about equally often, not every pixel.
        inference: ``convolutional`` passes over the whole image, ``patches`` cuts each out. They give the same but
            for VGG16, see `PatchNetwork.dense`.
        stride: pixels from one patch to the next in inference, a divisor of the network's; None for the network's own.
            In between, scores are interpolated.
        optimizer: see `VisionModule`.
        kwargs: schedule, mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/miou", "max")

    def __init__(
        self,
        num_classes: int = 21,
        class_names: list[str] | None = None,
        backbone: Backbone = "small",
        patch: int | None = None,
        width: float = 1.0,
        weights: str | None = None,
        patches_per_image: int = 32,
        balanced: bool = False,
        inference: Inference = "convolutional",
        stride: int | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.05),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if patches_per_image < 1:
            raise UserError(f"patches_per_image: expected 1 or more, found {patches_per_image}")
        if inference not in ("convolutional", "patches"):
            raise UserError(f"inference: expected convolutional or patches, found {inference}")
        self.num_classes, self.class_names = num_classes, class_names
        self.patches_per_image, self.balanced = patches_per_image, balanced
        self.network = PatchNetwork(num_classes, backbone, patch, width)
        self.stride = self.network.stride if stride is None else stride
        if self.stride < 1 or self.network.stride % self.stride:
            raise UserError(f"stride: expected a divisor of {self.network.stride}, {backbone}'s own, found {stride}")
        self.classify = classify_densely if inference == "convolutional" else classify_each_patch
        if weights is not None:
            load_weights(self.network, find_weights(backbone, weights), backbone, "classifier", convert=finite)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = self.preprocess(require_equal_size(batch["image"], CROP_ADVICE))
        row, column, label = draw_centers(batch["mask"], self.patches_per_image, self.balanced)
        image = torch.arange(len(images), device=images.device)[:, None]
        patches = patches_around(images, self.network.patch, 1)[image, :, row, column]
        return {"cross_entropy": cross_entropy(self.network(patches.flatten(0, 1)), label.flatten())}

    def scores(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Logits float32 (C,h,w) of each image, uint8 (B,3,h,w) or a list of (3,h,w), bilinear between the patches."""
        grids = of_each(lambda x: self.classify(self.network, self.preprocess(x), self.stride), images)
        cells = (resize(grid, (grid.shape[1] * self.stride, grid.shape[2] * self.stride)) for grid in grids)
        return [s[:, : image.shape[1], : image.shape[2]] for s, image in zip(cells, images, strict=True)]

    def predict(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        return to_maps(self.scores(images))

    def predict_batch(self, batch: dict[str, Any]) -> list[Tensor]:
        return to_maps(self.scores(batch["image"]), sizes_of(batch))

    def build_metrics(self) -> MetricCollection:
        return segmentation_metrics(self.num_classes)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["original_mask"])
