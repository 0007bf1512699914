"""DeepLab v1 (LargeFOV) and v2 (ASPP).

- Chen, Papandreou, Kokkinos, Murphy and Yuille, "Semantic Image Segmentation with Deep Convolutional Nets and Fully
  Connected CRFs", ICLR 2015.
- Chen, Papandreou, Kokkinos, Murphy and Yuille, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
  Atrous Convolution, and Fully Connected CRFs", PAMI 2018.

The last strides of a classifier become 1 and the later convolutions are dilated. The network then scores every eighth
pixel with an unchanged receptive field. Bilinear interpolation upsamples the scores; a dense CRF sharpens the edges.

N images of H x W pixels, h x w cells of the score map, C classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from errors import UserError
from lightning_modules.base import OptimizerFactory
from lightning_modules.components.image_batches import pad_to_multiple
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights, read_torch_file
from lightning_modules.components.vgg import classifier_as_convolutions, conv_relu, vgg16_plan
from lightning_modules.segmentation.base import cross_entropy, resize_aligned, upsample_aligned
from lightning_modules.segmentation.dilated_resnet import BatchNormNetwork, DilatedResNet, load_resnet_weights
from lightning_modules.segmentation.metrics import VOID
from lightning_modules.segmentation.multi_scale import MultiScaleSegmenter

Variant = Literal["largefov", "aspp", "resnet101"]

# --- network --------------------------------------------------------------------------------------------------------


class DeepLabNetwork(BatchNormNetwork):
    """DeepLab v1 and v2: normalized images float (N, 3, H, W) to logits of every eighth pixel, see `forward`.

    Parameters, for 21 classes: largefov 20,505,429; aspp 37,877,652; resnet101 44,048,532.

    The arguments are described in `DeepLab`.
    """

    def __init__(
        self,
        variant: Variant = "resnet101",
        num_classes: int = 21,
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        scales: Sequence[float] = (1.0,),
        freeze_batch_norm: bool = False,
        stride_in_1x1: bool = True,
    ) -> None:
        super().__init__(freeze_batch_norm)
        self.scales = tuple(scales)
        dilations = [12] if variant == "largefov" else [6, 12, 18, 24]
        self.features: nn.Sequential
        if variant == "resnet101":
            self.features = DilatedResNet("resnet101", width_multiplier, output_stride=8, stride_first=stride_in_1x1)
            channels = self.features.out_channels
            branches: list[nn.Module] = [nn.Identity() for _ in dilations]
            score = [nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in dilations]
        else:
            self.features = self._make_vgg16(width_multiplier, batch_norm)
            if variant == "largefov":
                self.features.append(nn.AvgPool2d(3, 1, 1))
            channels, hidden = (max(1, round(c * width_multiplier)) for c in (512, 1024))
            branches = [self._make_branch(channels, hidden, d, batch_norm) for d in dilations]
            score = [nn.Conv2d(hidden, num_classes, 1) for _ in dilations]
            for part in (self.features, *branches):
                he_normal(part)
        self.branches, self.score = nn.ModuleList(branches), nn.ModuleList(score)
        for layer in score:
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.train()

    @staticmethod
    def _make_vgg16(width_multiplier: float, batch_norm: bool) -> nn.Sequential:
        """Build VGG-16 with 3x3 pooling; the last two pools have stride 1, and later convolutions are dilated."""
        layers = make_layers(vgg16_plan(width_multiplier), batch_norm)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        for i in pools:
            layers[i] = nn.MaxPool2d(3, 1 if i in pools[3:] else 2, 1)
        for layer in layers[pools[3] :]:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (2, 2)
        return layers

    @staticmethod
    def _make_branch(in_channels: int, hidden: int, dilation: int, batch_norm: bool) -> nn.Module:
        # Like Caffe, drop single elements instead of channels.
        fc6 = conv_relu(in_channels, hidden, 3, batch_norm, padding=dilation, dilation=dilation)
        fc7 = conv_relu(hidden, hidden, 1, batch_norm)
        layers = {"fc6": nn.Sequential(*fc6, nn.Dropout(0.5)), "fc7": nn.Sequential(*fc7, nn.Dropout(0.5))}
        return nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute logits float32 (N, C, h, w) at each scale; with several scales, append their maximum at scale 1.

        Cell (i, j) lies on pixel (8 i, 8 j) of the scaled image. The last cells lie on its last pixels, after
        `pad_to_multiple`.
        """
        x = pad_to_multiple(x, 32, offset=1)
        logits = []
        for scale in self.scales:
            # Scale the distance between the first and the last pixel: 321 pixels become 241 and 161.
            height, width = (round((side - 1) * scale) + 1 for side in x.shape[2:])
            logits.append(self.cell_logits(resize_aligned(x, (height, width))))
        if len(logits) == 1:
            return logits
        size = (logits[0].shape[2], logits[0].shape[3])
        return [*logits, torch.stack([resize_aligned(one, size) for one in logits]).amax(0)]

    def cell_logits(self, x: Tensor) -> Tensor:
        """Sum the logits of the branches: images (N, 3, 8h - 7, 8w - 7) to float32 (N, C, h, w)."""
        x = self.features(x)
        each = [score(branch(x)).float() for branch, score in zip(self.branches, self.score, strict=True)]
        return torch.stack(each).sum(0)

    def pixel_logits(self, x: Tensor) -> Tensor:
        """Compute the logits of every pixel, float32 (N, C, H, W)."""
        return upsample_aligned(self(x)[-1], x.shape[2:])


# --- loss -----------------------------------------------------------------------------------------------------------


def subsample_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Take the class ids at the pixels on which cells lie, with aligned corners.

    For 321 pixels and 41 cells this is ``mask[:, ::8, ::8]``.

    Args:
        mask: class ids, int64 (N, H, W).
        size: (h, w), the number of cells.

    Returns:
        Class ids, int64 (N, h, w).
    """
    rows, columns = (
        torch.linspace(0, side - 1, cells, dtype=torch.float64, device=mask.device).round().long()
        for side, cells in zip(mask.shape[1:], size, strict=True)
    )
    return mask[:, rows[:, None], columns]


def deeplab_loss(outputs: Sequence[Tensor], mask: Tensor, scales: Sequence[float]) -> dict[str, Tensor]:
    """Compute the cross entropy of each scale and of their maximum, all with weight 1 (PAMI 2018, section 4.1.2).

    Args:
        outputs: logits of each scale and their maximum; see `DeepLabNetwork.forward`.
        mask: class ids of the network's input, int64 (N, H, W); 255 is void.
        scales: scales of the outputs.

    Returns:
        One term per output, in the order of the outputs.
    """
    mask = pad_to_multiple(mask, 32, offset=1, value=VOID)
    names = [f"scale_{scale:g}" for scale in scales] + ["maximum"] if len(scales) > 1 else ["cross_entropy"]
    return {
        name: cross_entropy(logits, subsample_mask(mask, logits.shape[2:]))
        for name, logits in zip(names, outputs, strict=True)
    }


# --- pretrained weights ---------------------------------------------------------------------------------------------


def convert_vgg16_weights(state: dict[str, Tensor], num_branches: int) -> dict[str, Tensor]:
    """Rename torchvision's VGG-16 weights; every branch starts from the subsampled fc6 and fc7.

    Args:
        state: weights by name; our own weights are returned as they are.
        num_branches: number of branches.
    """
    if any(key.startswith("score.") for key in state):
        return state
    converted = {key: value for key, value in state.items() if key.startswith("features.")}
    for name, value in classifier_as_convolutions(state, subsample=True).items():
        layer, parameter = name.split(".")
        for i in range(num_branches):
            converted[f"branches.{i}.{layer}.0.{parameter}"] = value
    return converted


def has_stride_in_1x1(weights: str | None) -> bool:
    """Return whether a ResNet's weights were trained with the stride of a bottleneck in its first 1x1 convolution.

    Torchvision trains with the stride in the 3x3 convolution. The paper's Caffe model has it in the 1x1 convolution,
    and so has a network from scratch. Our checkpoints record it; older ones had it in the 1x1 convolution.

    Args:
        weights: see `DeepLab`.
    """
    if weights is None:
        return True
    if not Path(weights).is_file():
        return False  # the name of torchvision's weights; `find_weights` reports a missing file
    content = read_torch_file(Path(weights))
    is_ours = any("features." in key for key in content.get("state_dict", content))
    return bool(content.get("hyper_parameters", {}).get("stride_in_1x1", is_ours))


# --- module ---------------------------------------------------------------------------------------------------------


class DeepLab(MultiScaleSegmenter):
    """DeepLab v1 and v2 (Chen et al. 2015, 2018). See `SemanticSegmenter` for batch, predictions and metrics.

    Biases have twice the learning rate and no weight decay.

    Args:
        variant: ``largefov`` is v1 on VGG-16, one branch with dilation 12; ``aspp`` is v2's ASPP-L on VGG-16, four
            branches with dilations 6 to 24; ``resnet101`` is v2 on ResNet-101, four score layers with these dilations.
        width_multiplier: scales the channels of all layers except the score layers.
        batch_norm: add batch normalization to each convolution of VGG-16 and of its branches.
        scales: scales of the image that the network combines, in training and prediction; the first is 1. v2 on
            ResNet-101 uses [1, 0.75, 0.5].
        freeze_batch_norm: normalize with the running statistics in training too, and do not train scale and shift.
        stride_in_1x1: position of the stride in a bottleneck of ResNet-101: true for the first 1x1 convolution, as in
            the authors' Caffe model, false for the 3x3 convolution, as in torchvision. It must match the weights. The
            default is that of the weights: false for torchvision's, true from scratch, and that of a checkpoint of
            ours. Set true for Caffe weights that were converted to torchvision's names: the file does not tell.
        weights: null to train from scratch; DEFAULT or the name of torchvision's weights of VGG-16 or ResNet-101; or a
            file: such weights, or one of our checkpoints.
        head_lr_scale: multiplies the learning rate of the score layers.
        optimizer: makes the optimizer from parameter groups. The default is the authors' for ResNet-101; theirs for
            VGG-16 has a learning rate of 1e-3.
        **kwargs: see `MultiScaleSegmenter`.
    """

    network: DeepLabNetwork

    def __init__(
        self,
        variant: Variant = "resnet101",
        width_multiplier: float = 1.0,
        batch_norm: bool = False,
        scales: Sequence[float] = (1.0,),
        freeze_batch_norm: bool = False,
        stride_in_1x1: bool | None = None,
        weights: str | None = None,
        head_lr_scale: float = 10.0,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(
            params, lr=2.5e-4, momentum=0.9, weight_decay=5e-4
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if variant not in ("largefov", "aspp", "resnet101"):
            raise UserError(f"variant: expected largefov, aspp or resnet101, found {variant}")
        if not scales or scales[0] != 1 or min(scales) <= 0 or len(set(scales)) != len(scales):
            raise UserError(f"scales: expected 1, then other factors above 0, found {list(scales)}")
        if variant == "resnet101" and batch_norm:
            raise UserError("batch_norm: expected false for variant resnet101, which always has it, found true")
        if variant != "resnet101" and freeze_batch_norm and not batch_norm:
            raise UserError(
                f"freeze_batch_norm: expected false for variant {variant} without batch_norm, found true; "
                "set --model.batch_norm true"
            )
        if variant != "resnet101" and stride_in_1x1 is not None:
            raise UserError(
                f"stride_in_1x1: expected null for variant {variant}, which has no bottlenecks, found {stride_in_1x1}"
            )
        self.head_lr_scale, self._stride_option = head_lr_scale, stride_in_1x1
        if variant == "resnet101" and stride_in_1x1 is None:
            stride_in_1x1 = has_stride_in_1x1(weights)
            if weights is not None:
                place = "first 1x1" if stride_in_1x1 else "3x3"
                rank_zero_only(print)(
                    f"stride_in_1x1: {place} convolution of each bottleneck, for {weights}", flush=True
                )
            self.hparams["stride_in_1x1"] = stride_in_1x1  # a checkpoint loads without the weights
        self.network = DeepLabNetwork(
            variant, self.num_classes, width_multiplier, batch_norm, scales, freeze_batch_norm, bool(stride_in_1x1)
        )
        if weights is not None and variant == "resnet101":
            load_resnet_weights(self.network, "resnet101", weights, "score")
        elif weights is not None:
            name = "vgg16_bn" if batch_norm else "vgg16"
            path, num_branches = find_weights(name, weights), len(self.network.branches)
            load_weights(
                self.network,
                path,
                name,
                "branches",
                "score",
                convert=lambda state: convert_vgg16_weights(state, num_branches),
            )

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return deeplab_loss(self.network(self.training_images(batch)), batch["mask"], self.network.scales)

    def pixel_logits(self, pixels: Tensor) -> Tensor:
        return self.network.pixel_logits(pixels)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the stride's position from the checkpoint, unless the option was given."""
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.network.features, DilatedResNet) and self._stride_option is None:
            recorded = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("stride_in_1x1", True)
            self.network.features.place_strides(recorded)
            self.hparams["stride_in_1x1"] = recorded

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = caffe_groups(nn.ModuleList([self.network.features, self.network.branches]))
        for group in caffe_groups(self.network.score):
            groups.append({**group, "lr_scale": self.head_lr_scale * group.get("lr_scale", 1.0)})
        return groups
