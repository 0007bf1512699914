"""Patch classifier: classify each pixel by the patch that is centered on it.

- Farabet, Couprie, Najman and LeCun, "Learning Hierarchical Features for Scene Labeling", PAMI 2013.
- Pinheiro and Collobert, "Recurrent Convolutional Neural Networks for Scene Labeling", ICML 2014.

The plain way classifies every patch separately (`classify_each_patch`). The fast way turns the fully connected layers
into convolutions, so that neighboring patches share their features (`classify_densely`): about 30 times as fast for 690
patches of 64 pixels (``python -m benchmarks.patch_classifier``).

N images of H x W pixels, C classes, P patches.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.vgg import vgg16_plan
from lightning_modules.segmentation.base import SemanticSegmenter, cross_entropy, resize_logits
from lightning_modules.segmentation.metrics import VOID

Backbone = Literal["small", "vgg16"]
Inference = Literal["convolutional", "patches"]

# --- network --------------------------------------------------------------------------------------------------------

# (kernel size, channels) of the small network's convolutions. Each is followed by batch normalization, ReLU and max
# pooling by 2. There is no padding and pooling drops no pixel of a patch: only then do both ways of inference agree.
SMALL = ((5, 32), (3, 64), (3, 128))


class PatchNetwork(nn.Module):
    """Classifier of patches: convolutions, then fully connected layers with dropout.

    With VGG-16, 21 classes and patches of 224 pixels it has 134,346,581 parameters.

    The arguments are described in `PatchClassifier`.
    """

    def __init__(
        self,
        num_classes: int = 21,
        backbone: Backbone = "small",
        patch_size: int | None = None,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if backbone not in ("small", "vgg16"):
            raise UserError(f"backbone: expected small or vgg16, found {backbone}")
        default_size, self.stride, min_size = (64, 8, 24) if backbone == "small" else (224, 32, 32)
        self.patch_size = patch_size or default_size
        if self.patch_size < min_size or self.patch_size % self.stride:
            raise UserError(
                f"patch_size: expected a multiple of {self.stride} that is at least {min_size} for {backbone}, "
                f"found {patch_size}"
            )
        if backbone == "small":
            modules: list[nn.Module] = []
            channels, self.map_size = 3, self.patch_size
            for kernel_size, out in SMALL:
                out = max(1, round(out * width_multiplier))
                conv = nn.Conv2d(channels, out, kernel_size, bias=False)
                modules += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
                channels, self.map_size = out, (self.map_size - kernel_size + 1) // 2
            self.features, hidden = nn.Sequential(*modules), [256]
        else:
            plan = vgg16_plan(width_multiplier)
            self.features, hidden = make_layers(plan), [4096, 4096]
            channels, self.map_size = int(plan[-2]), self.patch_size // self.stride
        layers: list[nn.Module] = []
        units = channels * self.map_size**2
        for out in (max(1, round(out * width_multiplier)) for out in hidden):
            layers += [nn.Linear(units, out), nn.ReLU(inplace=True), nn.Dropout(0.5)]
            units = out
        last = nn.Linear(units, num_classes)
        self.classifier = nn.Sequential(*layers, last)
        he_normal(self)
        nn.init.normal_(last.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized patches float (P, 3, patch_size, patch_size) to logits (P, C)."""
        return self.classifier(self.features(x).flatten(1))

    def dense(self, x: Tensor) -> Tensor:
        """Map normalized images float (N, 3, H, W) to logits (N, C, rows, columns) of a patch every `stride` pixels.

        The weights are the same: the first fully connected layer is a convolution with a kernel of the size of the
        feature map, the later ones are 1x1 convolutions. With VGG-16 the result differs from that of separate patches,
        because its layers see a patch's surroundings where a separate patch is padded with zeros.
        """
        x, kernel_size = self.features(x), self.map_size
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.unflatten(1, (-1, kernel_size, kernel_size))
                x, kernel_size = F.conv2d(x, weight, layer.bias), 1
            else:
                x = layer(x)
        return x


# --- patches --------------------------------------------------------------------------------------------------------


def pad_to_grid(images: Tensor, patch_size: int, stride: int) -> Tensor:
    """Pad normalized images (N, 3, H, W) with 0, the mean color, so that the grid of patches fits exactly.

    The grid has ceil(H / stride) rows and ceil(W / stride) columns. Position (i, j) represents the stride x stride cell
    that begins at pixel (stride * i, stride * j). Its patch is centered on the pixel at stride // 2 of the cell along
    both axes; the center of a patch is its pixel patch_size // 2.
    """
    before = patch_size // 2 - stride // 2
    after = [-(-size // stride) * stride - stride + patch_size - before - size for size in images.shape[2:]]
    return F.pad(images, (before, after[1], before, after[0]))


def extract_patches(images: Tensor, patch_size: int, stride: int) -> Tensor:
    """Return the patches of `pad_to_grid`, (N, 3, rows, columns, patch_size, patch_size), as an overlapping view."""
    return pad_to_grid(images, patch_size, stride).unfold(2, patch_size, stride).unfold(3, patch_size, stride)


def sample_centers(mask: Tensor, count: int, balance_classes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sample training pixels of each image without replacement, from torch's default generator.

    Args:
        mask: class ids, int64 (N, H, W); 255 is void. Void pixels are sampled only if an image has fewer than ``count``
            others.
        count: pixels per image, at most all of them.
        balance_classes: sample the classes of an image about equally often, instead of all pixels.

    Returns:
        Rows, columns and labels of the pixels, int64 (N, count).
    """
    ids = mask.flatten(1)
    # Exponential waiting times: with rates r, pixel i is first with probability r_i / sum r.
    times = torch.empty(ids.shape, device=mask.device).exponential_()
    if balance_classes:
        pixels = torch.zeros(len(ids), VOID + 1, device=mask.device).scatter_add_(1, ids, torch.ones_like(times))
        times = times * pixels.gather(1, ids)
    times = times.masked_fill(ids == VOID, torch.inf)
    index = times.topk(min(count, ids.shape[1]), largest=False).indices
    return index // mask.shape[2], index % mask.shape[2], ids.gather(1, index)


# --- decoding -------------------------------------------------------------------------------------------------------

PATCHES_PER_BATCH = 64


def classify_each_patch(network: PatchNetwork, images: Tensor, stride: int) -> Tensor:
    """Classify every patch of the grid separately.

    Args:
        network: classifier of patches.
        images: normalized images, float (N, 3, H, W).
        stride: stride of the grid; see `pad_to_grid`.

    Returns:
        Logits, float (N, C, rows, columns).
    """
    patches = extract_patches(images, network.patch_size, stride)
    count, rows, columns = patches.shape[0], *patches.shape[2:4]
    index = torch.arange(count * rows * columns, device=images.device)
    logits = [
        network(patches[i // (rows * columns), :, i // columns % rows, i % columns])
        for i in index.split(PATCHES_PER_BATCH)
    ]
    return torch.cat(logits).view(count, rows, columns, -1).permute(0, 3, 1, 2)


def classify_densely(network: PatchNetwork, images: Tensor, stride: int) -> Tensor:
    """Compute `classify_each_patch` with shared features (exactly, unless the network pads: `PatchNetwork.dense`).

    If the grid is finer than the network's stride, run one pass for each offset of the grid.

    Args:
        network: classifier of patches.
        images: normalized images, float (N, 3, H, W).
        stride: stride of the grid, a divisor of the network's stride; see `pad_to_grid`.

    Returns:
        Logits, float (N, C, rows, columns).
    """
    padded, passes = pad_to_grid(images, network.patch_size, stride), network.stride // stride
    if passes == 1:
        return network.dense(padded)
    rows, columns = (-(-size // stride) for size in images.shape[2:])
    logits = {
        (y, x): network.dense(padded[:, :, y * stride :, x * stride :])
        for y, x in itertools.product(range(min(passes, rows)), range(min(passes, columns)))
    }
    result = logits[0, 0].new_empty(*logits[0, 0].shape[:2], rows, columns)
    for (y, x), part in logits.items():
        result[:, :, y::passes, x::passes] = part
    return result


# --- module ---------------------------------------------------------------------------------------------------------


class PatchClassifier(SemanticSegmenter):
    """Patch classifier (Farabet et al. 2013). See `SemanticSegmenter` for batch, predictions and metrics.

    It is trained on patches with sampled centers; the label is the class of the center pixel. Pixels beyond the image
    have the mean color.

    Args:
        backbone: ``small``, three convolutions without padding and one hidden layer, with stride 8; or ``vgg16``,
            torchvision's, with stride 32.
        patch_size: side of a patch in pixels: for ``small`` a multiple of 8 that is at least 24, null for 64; for
            ``vgg16`` a multiple of 32, null for 224.
        width_multiplier: scales channels and hidden units.
        weights: null to train from scratch; DEFAULT or the name of torchvision's weights for VGG-16; or a file: such
            weights, or one of our checkpoints. The last layer may have other classes.
        patches_per_image: training patches per image.
        balance_classes: sample the classes of an image about equally often, instead of all pixels.
        inference: ``patches`` classifies every patch separately; ``convolutional`` computes the same in one pass over
            the image (VGG-16 differs by its zero padding).
        stride: pixels between patches in inference, a divisor of the backbone's stride; null for the backbone's stride.
            Logits between patches are interpolated.
        optimizer: makes the optimizer from parameter groups.
        **kwargs: see `SemanticSegmenter`.
    """

    network: PatchNetwork

    def __init__(
        self,
        backbone: Backbone = "small",
        patch_size: int | None = None,
        width_multiplier: float = 1.0,
        weights: str | None = None,
        patches_per_image: int = 32,
        balance_classes: bool = False,
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
        self.patches_per_image, self.balance_classes = patches_per_image, balance_classes
        self.network = PatchNetwork(self.num_classes, backbone, patch_size, width_multiplier)
        self.stride = self.network.stride if stride is None else stride
        if self.stride < 1 or self.network.stride % self.stride:
            raise UserError(
                f"stride: expected a divisor of {self.network.stride}, the stride of {backbone}, found {stride}"
            )
        self.classify = classify_each_patch if inference == "patches" else classify_densely
        if weights is not None:
            load_weights(self.network, find_weights(backbone, weights), backbone, "classifier")

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = self.training_images(batch)
        row, column, label = sample_centers(batch["mask"], self.patches_per_image, self.balance_classes)
        image = torch.arange(len(images), device=images.device)[:, None]
        patches = extract_patches(images, self.network.patch_size, 1)[image, :, row, column]
        return {"cross_entropy": cross_entropy(self.network(patches.flatten(0, 1)), label.flatten())}

    def pixel_logits(self, pixels: Tensor) -> Tensor:
        """Classify the patches of the grid, and interpolate their logits: float32 (N, C, H, W)."""
        height, width = pixels.shape[2:]
        grid = self.classify(self.network, pixels, self.stride)
        size = (grid.shape[2] * self.stride, grid.shape[3] * self.stride)
        return torch.stack([resize_logits(logits, size) for logits in grid])[:, :, :height, :width]
