"""AlexNet as in the paper: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep CNNs", NIPS 2012.

Torchvision's ``alexnet`` is another network, that of Krizhevsky 2014 ("one weird trick"): 64 to 256 channels, no
normalization, no groups. This is the one of 2012, section by section:

- 3.1 ReLU after every convolution and every hidden fully connected layer.
- 3.2 Two GPUs. The second, fourth and fifth convolutions see only the maps of their own GPU: here ``groups=2``.
- 3.3 Local response normalization after the first and second convolutions' ReLU.
- 3.4 Overlapping pooling, 3x3 windows 2 apart, after both normalizations and after the fifth convolution.
- 3.5 Five convolutions of 96, 256, 384, 384, 256 maps, then 4096, 4096 and 1000 units. The text says 224
  pixels; its 55x55 maps of an 11x11 convolution at stride 4 need 227.
- 4.2 Dropout of one half on the outputs of the first two fully connected layers.
- 5   Weights from N(0, 0.01); biases 1 in convolutions 2, 4, 5 and the hidden fully connected layers, otherwise 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError


class LocalResponseNorm(nn.Module):
    """Section 3.3: b_i = a_i / (k + alpha * sum of a_j^2 over the ``size`` maps around i) ^ beta.

    ``torch.nn.LocalResponseNorm`` divides alpha by the size first; the paper does not, so alpha is given to it times
    the size. Activations (N,C,H,W) of any float type; the result has the same type.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        # Squares of activations beyond 255 overflow float16, and the input here is on a scale of 0..255.
        normalized = F.local_response_norm(x.float(), self.size, self.alpha * self.size, self.beta, self.k)
        return normalized.to(x.dtype)


class AlexNet2012(nn.Module):
    """The network of the 2012 paper; 60,965,224 parameters at 1000 classes.

    The paper subtracts the mean from pixels on a scale of 0..255 and does not divide by their spread; its small initial
    weights count on that scale.

    Args:
        num_classes: outputs of the last layer.
        dropout: of the two hidden fully connected layers.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.norm = LocalResponseNorm()
        self.pool = nn.MaxPool2d(3, stride=2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.initialize()

    def initialize(self) -> None:
        """Section 5. The ones give the ReLUs positive inputs, which quickens the first stages of learning."""
        with_one = (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.01)
                assert layer.bias is not None
                nn.init.constant_(layer.bias, 1.0 if layer in with_one else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Images float (N,3,227,227), mean subtracted, to logits (N, classes)."""
        if x.shape[-2:] != (227, 227):
            found = "x".join(map(str, x.shape[-2:]))
            raise UserError(
                f"alexnet_2012: expected 227x227 pixels, found {found}: "
                "set --data.image_size 227 and --data.eval_crop 227"
            )
        x = self.pool(self.norm(F.relu(self.conv1(x))))  # (N, 96, 27, 27)
        x = self.pool(self.norm(F.relu(self.conv2(x))))  # (N, 256, 13, 13)
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = self.pool(F.relu(self.conv5(x)))  # (N, 256, 6, 6)
        x = torch.flatten(x, 1)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.fc8(x)
