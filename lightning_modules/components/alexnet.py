"""AlexNet: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep CNNs", NIPS 2012.

Torchvision's ``alexnet`` is a different network, that of Krizhevsky 2014 ("One weird trick"): 64 to 256 channels, no
normalization, no groups. This is the network of 2012, section by section:

- 3.1 ReLU after every convolution and every hidden fully connected layer.
- 3.2 Two GPUs: convolutions 2, 4 and 5 see only the feature maps of their own GPU, here ``groups=2``.
- 3.3 Local response normalization after the ReLU of convolutions 1 and 2.
- 3.4 Overlapping pooling, 3x3 windows with stride 2, after both normalizations and after convolution 5.
- 3.5 Five convolutions of 96, 256, 384, 384, 256 channels, then 4096, 4096 and 1000 units. The text says 224 pixels;
  the 55x55 maps of its 11x11 convolution at stride 4 need 227.
- 4.2 Dropout of 0.5 on the outputs of the first two fully connected layers.
- 5   Weights from N(0, 0.01); biases 1 in convolutions 2, 4, 5 and the hidden fully connected layers, otherwise 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError


class LocalResponseNorm(nn.Module):
    """Normalize across channels (section 3.3): b_i = a_i / (k + alpha * sum of a_j^2 over the window around i)^beta.

    `torch.nn.LocalResponseNorm` divides alpha by the window size; the paper does not.

    Args:
        size: channels in the window, n in the paper.
        alpha: factor of the sum of squares.
        beta: exponent.
        k: added to the sum.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        # In float32: pixels are on a scale of 0..255, and squares of activations beyond 255 overflow float16.
        normalized = F.local_response_norm(x.float(), self.size, self.alpha * self.size, self.beta, self.k)
        return normalized.to(x.dtype)


class AlexNet2012(nn.Module):
    """The network of the paper; 60,965,224 parameters with 1000 classes.

    The paper subtracts the mean from pixels on a scale of 0..255 and does not divide by the standard deviation. The
    small initial weights belong to that scale.

    Args:
        num_classes: outputs of the last layer.
        dropout: dropout of the two hidden fully connected layers.
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
        """Initialize as in section 5. Biases of 1 give the ReLUs positive inputs, which accelerates early learning."""
        bias_one = (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.01)
                assert layer.bias is not None
                nn.init.constant_(layer.bias, 1.0 if layer in bias_one else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map images minus their mean, float (N, 3, 227, 227), to logits (N, C)."""
        if x.shape[-2:] != (227, 227):
            found = "x".join(map(str, x.shape[-2:]))
            raise UserError(
                f"alexnet_2012: expected 227x227 pixels, found {found}; "
                "set --data.image_size 227 and --data.eval_crop_size 227"
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
