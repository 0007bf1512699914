"""Dilated ResNet against the strided one."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet50

from lightning_modules.segmentation.dilated_resnet import Conv1x1, DilatedResNet


def test_dilation_gives_what_strides_leave_out() -> None:
    """At every 32nd pixel the dilated network equals the strided one of the authors."""
    torch.manual_seed(0)
    strided = resnet50().eval()
    for stage in (strided.layer2, strided.layer3, strided.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    dilated = DilatedResNet("resnet50", output_stride=8, stride_first=True).eval()
    state = {key: value for key, value in strided.state_dict().items() if not key.startswith("fc.")}
    dilated.load_state_dict(state)
    pixels = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        x = strided.maxpool(strided.relu(strided.bn1(strided.conv1(pixels))))
        expected = strided.layer4(strided.layer3(strided.layer2(strided.layer1(x))))
        found = dilated(pixels)
    assert found.shape[2:] == (9, 13)
    torch.testing.assert_close(found[:, :, ::4, ::4], expected, rtol=1e-4, atol=1e-4)


def test_conv1x1_is_a_convolution_with_a_stride() -> None:
    torch.manual_seed(0)
    layer = Conv1x1(8, 5, 2)
    x = torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight, stride=2))
