"""Image classification with the networks of ImageNet's history, from scratch or from pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from lightning_modules.classification.base import Classifier
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.networks import AUX_HEADS, NetworkName, build_network, network_config
from lightning_modules.components.parameter_groups import head_groups
from lightning_modules.components.pretrained import find_weights, load_weights


def ten_crops(images: Tensor, size: int) -> list[Tensor]:
    """Cut four corners and the center, and flip them horizontally (Krizhevsky et al. 2012, section 4.1).

    Args:
        images: (B, 3, H, W).
        size: side of the crops in pixels.

    Returns:
        Ten crops (B, 3, size, size).

    Raises:
        UserError: the images are not larger than the crops.
    """
    height, width = images.shape[-2:]
    if height <= size or width <= size:
        raise UserError(
            f"ten_crop: expected images larger than {size} pixels on both sides, found {height}x{width}; "
            f"set --data.eval_crop_size {256 if size in (224, 227) else round(size * 8 / 7)}"
        )
    bottom, right = height - size, width - size
    positions = ((0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2)))
    crops = [images[..., y : y + size, x : x + size] for y, x in positions]
    return crops + [crop.flip(-1) for crop in crops]


class ImageClassifier(Classifier):
    """A classification network, trained by cross entropy.

    Batch, prediction and metrics: see `Classifier`. GoogLeNet and Inception-v3 are trained with auxiliary heads, whose
    weighted losses are the terms ``aux1`` and ``aux2``; predictions do not use them.

    Args:
        backbone: name of the network. ``alexnet`` is torchvision's of 2014, ``alexnet_2012`` that of the paper; names
            ending in ``_cifar`` are ResNets for 32x32 pixels.
        num_classes: number of classes, C; ``train.py`` takes it from the data.
        weights: None trains from scratch; DEFAULT (or IMAGENET1K_V1, ...) loads torchvision's ImageNet weights; a file
            is a state dict or a checkpoint. A last layer for another number of classes is initialized anew.
        base_channels: channels of the first stage of a CIFAR ResNet.
        label_smoothing: fraction of the target that is spread over all classes.
        aux_loss_weight: weight of each auxiliary loss; 0 omits the heads. None for 0.3 with GoogLeNet (Szegedy et al.
            2015, section 5) and 0.4 with Inception-v3 (the authors' TF-slim code; the paper gives none).
        dropout: None for torchvision's; GoogLeNet's paper has 0.4 where torchvision has 0.2.
        input_size: side in pixels of the network's input, for ``ten_crop``; None for 224, 227 with alexnet_2012, 299
            with inception_v3, 32 with the CIFAR ResNets.
        ten_crop: average the probabilities over ten crops of ``input_size`` in evaluation, at ten times the cost; set
            ``--data.eval_crop_size`` to a larger size.
        freeze_backbone: train the last layer only; all other layers stay in eval mode.
        head_lr_scale: factor of the learning rate of the last layer.
        mean: mean of the pixels in 0..1 per RGB channel; None for the value that the network was trained with: 0.5 for
            GoogLeNet and Inception-v3, ImageNet's for the others.
        std: standard deviation of the pixels in 0..1 per RGB channel; None for the value that the network was trained
            with: 0.5 for GoogLeNet and Inception-v3, 1/255 for alexnet_2012, ImageNet's for the others.
        **kwargs: see `Classifier`.
    """

    def __init__(
        self,
        backbone: NetworkName = "resnet50",
        num_classes: int = 1000,
        weights: str | None = None,
        base_channels: int = 16,
        label_smoothing: float = 0.0,
        aux_loss_weight: float | None = None,
        dropout: float | None = None,
        input_size: int | None = None,
        ten_crop: bool = False,
        freeze_backbone: bool = False,
        head_lr_scale: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        config = network_config(backbone)
        super().__init__(num_classes=num_classes, mean=mean or config.mean, std=std or config.std, **kwargs)
        self.label_smoothing, self.ten_crop = label_smoothing, ten_crop
        self.input_size = input_size or config.input_size
        self.aux_loss_weight = config.aux_loss_weight if aux_loss_weight is None else aux_loss_weight
        self.freeze_backbone, self.head_lr_scale = freeze_backbone, head_lr_scale
        # Auxiliary heads train the backbone only.
        aux_logits = self.aux_loss_weight > 0 and not freeze_backbone
        self.network = build_network(backbone, num_classes, base_channels, dropout, aux_logits)
        if weights is not None:
            # Of VGG and AlexNet, files without fc6 and fc7 are accepted, too.
            head = config.head.split(".")[0]
            load_weights(self.network, find_weights(backbone, weights), backbone, head, *AUX_HEADS)
        self.head_name = config.head
        if freeze_backbone:
            self.network.requires_grad_(False).get_submodule(self.head_name).requires_grad_(True)
        self.train()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``cross_entropy``, and in training the weighted ``aux1`` (nearest to the image) and ``aux2``."""
        outputs = self.network(self.preprocess(self._stack(batch["image"])))
        # Torchvision returns logits, aux_logits2, aux_logits1.
        logits, *aux_logits = outputs if isinstance(outputs, tuple) else (outputs,)
        terms = {"cross_entropy": self.cross_entropy(logits, batch["label"], self.label_smoothing)}
        for i, aux in enumerate(reversed(aux_logits), start=1):
            terms[f"aux{i}"] = self.aux_loss_weight * self.cross_entropy(aux, batch["label"], self.label_smoothing)
        return terms

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Return ``probabilities`` float32 (B, C) of uint8 images (B, 3, H, W), or a list of (3, H, W) of one size."""
        stacked = self._stack(images)
        crops = ten_crops(stacked, self.input_size) if self.ten_crop else [stacked]
        probabilities = [self.network(self.preprocess(crop)).float().softmax(1) for crop in crops]
        return {"probabilities": torch.stack(probabilities).mean(0)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return head_groups(self, [self.network.get_submodule(self.head_name)], self.head_lr_scale)

    def train(self, mode: bool = True) -> ImageClassifier:
        """Set the training mode; a frozen backbone stays in eval mode, so that its batch statistics do not change."""
        super().train(mode)
        if self.freeze_backbone:
            self.network.eval().get_submodule(self.head_name).train(mode)
        return self

    @staticmethod
    def _stack(images: Tensor | list[Tensor]) -> Tensor:
        return require_equal_size(images, "--data.eval_crop_size")
