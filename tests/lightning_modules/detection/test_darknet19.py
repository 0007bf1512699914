"""Darknet-19: parameter count, and the loader of the authors' weight files."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from errors import UserError
from lightning_modules.detection.darknet19 import Darknet19, load_darknet_weights
from lightning_modules.detection.yolo_v2 import YOLOv2Network


def write_weights(
    network: nn.Module, path: Path, rng: np.random.Generator, convolutions: int = 99, header: bytes = b""
) -> None:
    """Write random weights of the first convolutions: bias, scale, mean, variance, weights."""
    modules = list(network.modules())
    values = []
    for i, conv in enumerate(modules):
        if isinstance(conv, nn.Conv2d) and convolutions > 0:
            convolutions -= 1
            out = conv.out_channels
            values.append(rng.normal(0, 0.1, out))
            if isinstance(modules[i + 1] if i + 1 < len(modules) else None, nn.BatchNorm2d):
                values += [rng.uniform(0.7, 1.3, out), rng.normal(0, 0.3, out), rng.uniform(0.5, 1.5, out)]
            fan_in = conv.weight[0].numel()
            # The last convolution has smaller weights, since it predicts logarithms.
            values.append(rng.normal(0, (1.4 if conv.bias is None else 0.5) / math.sqrt(fan_in), conv.weight.numel()))
    data = np.concatenate(values).astype("<f4").tobytes()
    path.write_bytes((header or struct.pack("<iiiq", 0, 2, 0, 0)) + data)


def test_the_papers_classifier() -> None:
    with torch.device("meta"):
        classifier = Darknet19()
    assert sum(p.numel() for p in classifier.parameters()) == 20_842_376
    assert classifier(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert len([m for m in classifier.modules() if isinstance(m, nn.Conv2d)]) == 19


HEADERS = {
    "0.2": struct.pack("<iiiq", 0, 2, 0, 5_000_000_000),
    "0.2.5": struct.pack("<iiiq", 0, 2, 5, 64),
    "0.1": struct.pack("<iiii", 0, 1, 0, 64),
    "transposed": struct.pack("<iiii", 0, 2000, 0, 64),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers(header: str, tmp_path: Path) -> None:
    network = YOLOv2Network(3, width_multiplier=0.05)
    write_weights(network, tmp_path / "x", np.random.default_rng(0), header=HEADERS[header])
    assert load_darknet_weights(network, tmp_path / "x") == 23
    first = np.random.default_rng(0).normal(0, 0.1, 2).astype(np.float32)
    assert network.fine[0][1].bias.tolist() == first.tolist()  # type: ignore[index, union-attr]


def test_the_classifiers_trunk_loads_the_leading_layers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    classifier, detector = Darknet19(10, width_multiplier=0.05), YOLOv2Network(3, width_multiplier=0.05)
    before = detector.output.weight.clone()
    path = tmp_path / "darknet19_448.conv.23"
    write_weights(classifier, path, np.random.default_rng(1), convolutions=18)
    assert load_darknet_weights(detector, path) == 18
    assert "18 of 23 convolutions; the last 5 are newly initialized" in capsys.readouterr().out
    assert load_darknet_weights(classifier, path) == 18
    trunk = [*classifier.features.parameters(), *classifier.features.buffers()]
    ours = [p for part in (detector.fine, detector.coarse) for p in part.parameters()]
    ours += [b for part in (detector.fine, detector.coarse) for b in part.buffers()]
    assert len(trunk) == len(ours) > 50
    assert all(torch.equal(a, b) for a, b in zip(trunk, ours, strict=True))
    assert torch.equal(detector.output.weight, before)


def test_files_that_are_not_the_networks(tmp_path: Path) -> None:
    network, path = YOLOv2Network(3, width_multiplier=0.05), tmp_path / "x.weights"
    write_weights(network, path, np.random.default_rng(0))
    data = path.read_bytes()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    count = (len(data) - 20) // 4

    def assert_refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            load_darknet_weights(network, path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)

    assert_refused(data[:-400], f"expected {count} values up to convolution 23 of 23, found {count - 100} .* truncated")
    assert_refused(data[:-401], "expected a darknet file")
    assert_refused(data[:20], "expected a darknet file")
    assert_refused(b"", "expected a darknet file")
    assert_refused(data + bytes(4), f"expected {count} values, found {count + 1}")
    assert_refused(b"<!DOCTYPE html>\n" * 100_000, "another network")
    assert_refused(data[:-4] + struct.pack("<f", math.nan), "expected finite values .* in convolution 23")
    # If the header is read as 4 bytes too long, the variances are other values.
    assert_refused(struct.pack("<iiii", 0, 1, 0, 0) + data[20:] + bytes(4), "weights")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
