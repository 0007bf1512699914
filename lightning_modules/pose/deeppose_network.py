"""DeepPose's networks: what sees a crop and says where the joints are in it.

Toshev and Szegedy, "DeepPose: Human Pose Estimation via Deep Neural Networks", CVPR 2014, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from errors import UserError
from lightning_modules.components.alexnet import LocalResponseNorm
from lightning_modules.components.networks import AUXILIARY
from lightning_modules.components.pretrained import find_weights, load_weights

ALEXNET = "alexnet_2014"  # the paper's


class AlexTrunk(nn.Sequential):
    """The paper's network up to its last layer: float (N,3,S,S) to (N,4096), for 220 pixels by way of 55, 27, 13 and 6.

    Args:
        input_size: S. The first fully connected layer is as large as what the convolutions make of it.
        width: multiplies all channels and units.
        dropout: after each of the two fully connected layers.
        batch_norm: after each convolution, in place of local response normalization; for training from scratch.

    Raises:
        ValueError: nothing is left of so small an input.
    """

    def __init__(self, input_size: int = 220, width: float = 1.0, dropout: float = 0.6, batch_norm: bool = False):
        side = (input_size + 8 - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        if side < 1:
            raise UserError(f"input_size: expected 59 pixels or more for {ALEXNET}, found {input_size}")
        layers: list[nn.Module] = []
        channels = 3
        # Normalization and pooling follow the first two convolutions, pooling the last.
        for out, kernel, stride, padding, norm, pool in (
            (96, 11, 4, 4, True, True),
            (256, 5, 1, 2, True, True),
            (384, 3, 1, 1, False, False),
            (384, 3, 1, 1, False, False),
            (256, 3, 1, 1, False, True),
        ):
            out = max(1, round(out * width))
            layers.append(nn.Conv2d(channels, out, kernel, stride, padding))
            layers += [nn.BatchNorm2d(out)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            layers += [LocalResponseNorm()] if norm and not batch_norm else []
            layers += [nn.MaxPool2d(3, 2)] if pool else []
            channels = out
        self.out_features = max(1, round(4096 * width))
        layers.append(nn.Flatten())
        for features in (channels * side**2, self.out_features):
            layers += [nn.Linear(features, self.out_features), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        super().__init__(*layers)
        for layer in self:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)


def torchvision_trunk(backbone: str, weights: str | None) -> tuple[nn.Module, int]:
    """A classification network of torchvision's without its last layer, and how many features it gives.

    Raises:
        ValueError: there is none of that name, or its last layer is not linear.
    """
    if backbone not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"backbone: expected {ALEXNET} or a classification network of torchvision's, found {backbone}")
    options: dict[str, Any] = {}
    if backbone in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False, "transform_input": False}
    network = torchvision.models.get_model(backbone, weights=None, **options)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"backbone: expected a network that ends in a linear layer, found {backbone}")
    head = linear[-1]
    features = network.get_submodule(head).in_features
    if weights is not None:
        load_weights(network, find_weights(backbone, weights), backbone, head, *AUXILIARY)
    network.set_submodule(head, nn.Identity())
    return network, int(features)  # type: ignore[arg-type]


class PoseRegressor(nn.Module):
    """Normalized crops float (N,3,S,S) to where the joints are, float32 (N,K,2), in crops from the center.

    The paper's has 58,396,060 parameters with 14 joints and 58,412,448 with 16. (The paper says 40 million, which its
    layers do not give.)

    Args:
        joints: K.
        backbone: ``alexnet_2014`` is the paper's; or a classification network of torchvision's.
        weights: of torchvision's network, see `find_weights`; None: from scratch.
        input_size, width, dropout, batch_norm: of the paper's network, see `AlexTrunk`.
    """

    def __init__(
        self,
        joints: int = 16,
        backbone: str = ALEXNET,
        weights: str | None = None,
        input_size: int = 220,
        width: float = 1.0,
        dropout: float = 0.6,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.trunk: nn.Module
        if backbone == ALEXNET:
            self.trunk = AlexTrunk(input_size, width, dropout, batch_norm)
            features = self.trunk.out_features
        else:
            self.trunk, features = torchvision_trunk(backbone, weights)
        self.joints = nn.Linear(features, 2 * joints)
        # At first every joint is in the middle of its crop: a refiner begins by changing little.
        nn.init.normal_(self.joints.weight, std=1e-3)
        nn.init.zeros_(self.joints.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        # bfloat16 would round places to a pixel of the crop.
        with torch.autocast(features.device.type, enabled=False):
            return self.joints(features.float()).unflatten(1, (-1, 2))
