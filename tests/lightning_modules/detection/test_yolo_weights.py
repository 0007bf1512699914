"""Weights of YOLO and YOLOv2: darknet files and our checkpoints, their class names, and files of other networks."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.voc import VOC_CLASSES
from errors import UserError
from lightning_modules.base import IMAGENET_MEAN
from lightning_modules.detection.base import Detector
from lightning_modules.detection.yolo_v1 import YOLOv1, YOLOv1Network
from lightning_modules.detection.yolo_v2 import YOLOv2, YOLOv2Network
from lightning_modules.detection.yolo_weights import published_class_names
from tests.lightning_modules.detection.test_darknet19 import write_weights

SMALL_V1: dict[str, Any] = {"grid_size": 2, "input_size": 128, "width_multiplier": 0.05, "hidden_units": 8}


def write_yolo_v1(network: YOLOv1Network, path: Path, seed: int, transposed: bool = False, layers: int = 99) -> None:
    """Write random weights of the first layers as darknet does: bias and weights."""
    rng, values = np.random.default_rng(seed), []
    for layer in [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:layers]:
        weight = rng.normal(0, 1.4 / math.sqrt(layer.weight[0].numel()), tuple(layer.weight.shape))
        stored = weight.T if transposed and isinstance(layer, nn.Linear) else weight
        values += [rng.normal(0, 0.1, len(layer.weight)), stored.ravel()]
    # Files of 2015 start with the learning rate, momentum and decay: as integers, they are above 1000.
    header = struct.pack("<fffi", 0.01, 0.9, 0.0005, 64) if transposed else struct.pack("<iiii", 0, 1, 0, 64)
    path.write_bytes(header + np.concatenate(values).astype("<f4").tobytes())


def darknet_boxes(weights: Path, network: YOLOv1Network, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Run a darknet file without our loader: boxes (x, y, w, h) (S * S, B, 4) and scores (S * S, B, C)."""
    values = torch.from_numpy(np.frombuffer(weights.read_bytes()[16:], "<f4").copy())
    x = image
    for module in [m for m in network.modules() if not list(m.children())]:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            sizes = [len(module.weight), module.weight.numel()]
            bias, weight, values = values.split([*sizes, len(values) - sum(sizes)])
            weight = weight.view(module.weight.shape)
            if isinstance(module, nn.Conv2d):
                x = nn.functional.conv2d(x, weight, bias, module.stride, module.padding)
            else:
                x = nn.functional.linear(x.flatten(1), weight, bias)
                x = nn.functional.leaky_relu(x, 0.1) if module is network.fc1 else x
        elif not isinstance(module, nn.Dropout):
            x = module(x)
    assert len(values) == 0
    output, side, per_cell, classes = x[0].numpy(), network.grid_size, 2, 20
    cells, boxes, scores = side**2, np.zeros((side**2, 2, 4)), np.zeros((side**2, 2, 20))
    # darknet/src/detection_layer.c: get_detection_boxes.
    for i in range(cells):
        for n in range(per_cell):
            scale = output[cells * classes + i * per_cell + n]
            at = cells * (classes + per_cell) + (i * per_cell + n) * 4
            boxes[i, n] = [
                (output[at] + i % side) / side,
                (output[at + 1] + i // side) / side,
                output[at + 2] ** 2,
                output[at + 3] ** 2,
            ]
            scores[i, n] = scale * output[i * classes : (i + 1) * classes]
    return boxes, scores


def test_the_names_are_those_of_voc_and_coco() -> None:
    assert tuple(published_class_names(20) or ()) == VOC_CLASSES
    coco = published_class_names(80) or []
    assert (len(coco), coco[0], coco[16], coco[79]) == (80, "person", "dog", "toothbrush")
    assert published_class_names(3) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_a_darknet_file_of_yolo_v1_predicts_what_darknet_does(transposed: bool, tmp_path: Path) -> None:
    network = YOLOv1Network(num_classes=20, grid_size=2, width_multiplier=0.05, hidden_units=8).eval()
    write_yolo_v1(network, tmp_path / "yolo.weights", seed=0, transposed=transposed)
    write_yolo_v1(network, tmp_path / "plain.weights", seed=0)
    module = YOLOv1(weights=str(tmp_path / "yolo.weights"), **SMALL_V1).eval()
    assert module.class_names == module.hparams["class_names"] == list(VOC_CLASSES)
    assert module.hparams["mean"] == module.hparams["std"] == [0.5] * 3
    pixels = torch.randint(256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, scores = darknet_boxes(tmp_path / "plain.weights", network, pixels / 255 * 2 - 1)
    with torch.no_grad():
        output = module(pixels)[0].view(4, 30).numpy()
    raw = output[:, :10].reshape(4, 2, 5)
    column, row = np.arange(4) % 2, np.arange(4) // 2
    ours = [(raw[..., 0] + column[:, None]) / 2, (raw[..., 1] + row[:, None]) / 2, raw[..., 2] ** 2, raw[..., 3] ** 2]
    np.testing.assert_allclose(np.stack(ours, -1), boxes, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(raw[..., 4:] * output[:, None, 10:], scores, rtol=1e-3, atol=1e-4)


def test_the_first_layers_of_a_darknet_file_start_yolo_v1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = YOLOv1Network(num_classes=20, grid_size=2, width_multiplier=0.05, hidden_units=8)
    write_yolo_v1(network, tmp_path / "extraction.conv.weights", seed=0, layers=20)
    module = YOLOv1(num_classes=3, weights=str(tmp_path / "extraction.conv.weights"), **SMALL_V1)
    assert "20 of 26 layers; the last 6 are newly initialized" in capsys.readouterr().out
    assert module.class_names is None
    assert torch.allclose(module.pixel_mean.value.flatten(), torch.tensor(IMAGENET_MEAN) * 255)


def test_given_names_and_normalization_are_kept(tmp_path: Path) -> None:
    write_weights(YOLOv2Network(20, width_multiplier=0.05), tmp_path / "x.weights", np.random.default_rng(0))
    names = [f"own {i}" for i in range(20)]
    module = YOLOv2(width_multiplier=0.05, weights=str(tmp_path / "x.weights"), class_names=names)
    assert module.class_names == names
    assert YOLOv2(width_multiplier=0.05, weights=str(tmp_path / "x.weights")).class_names == list(VOC_CLASSES)
    network = YOLOv1Network(num_classes=20, grid_size=2, width_multiplier=0.05, hidden_units=8)
    write_yolo_v1(network, tmp_path / "yolo.weights", seed=0)
    v1 = YOLOv1(weights=str(tmp_path / "yolo.weights"), mean=(0.1, 0.2, 0.3), **SMALL_V1)
    assert v1.pixel_mean.value.flatten().tolist() == pytest.approx([25.5, 51, 76.5])


@pytest.mark.parametrize("backbone", ["v2", "darknet", "resnet18"])
@pytest.mark.parametrize("bare", [False, True], ids=["checkpoint", "state dict"])
def test_own_checkpoints(backbone: str, bare: bool, tmp_path: Path) -> None:
    def build(weights: str | None = None, classes: int = 3) -> Detector:
        if backbone == "v2":
            return YOLOv2(num_classes=classes, width_multiplier=0.05, weights=weights)
        return YOLOv1(backbone, num_classes=classes, weights=weights, **SMALL_V1)  # type: ignore[arg-type]

    first, path = build(), tmp_path / "own.ckpt"
    hparams = {"num_classes": 3, "class_names": ["a", "b", "c"]}
    torch.save(
        first.network.state_dict() if bare else {"state_dict": first.state_dict(), "hyper_parameters": hparams}, path
    )
    module = build(str(path))
    state = module.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.network.state_dict().items())
    assert module.class_names == (None if bare else ["a", "b", "c"])
    found = "own.ckpt" if bare else "num_classes: expected 3, as in the checkpoint .*own.ckpt, found 20"
    with pytest.raises(UserError, match=found) as error:
        build(str(path), classes=20)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["v1", "v2"])
def test_wrong_files_are_refused_in_one_line(model: str, tmp_path: Path) -> None:
    path = tmp_path / "x.weights"

    def build() -> Detector:
        v1 = model == "v1"
        return YOLOv1(weights=str(path), **SMALL_V1) if v1 else YOLOv2(width_multiplier=0.05, weights=str(path))

    def refused() -> str:
        with pytest.raises(UserError, match="weights: ") as error:
            build()
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        return str(error.value)

    path.write_bytes(b"<!DOCTYPE html>\n")
    assert "expected a darknet file with a header of" in refused()
    assert "or a checkpoint" in refused()
    path.write_bytes(b"PK\x03\x04 truncated")
    assert "expected a state dict or checkpoint" in refused()
    torch.save({"state_dict": nn.Linear(3, 4).state_dict()}, path)
    assert "of another shape" in refused()
    other = YOLOv1Network(num_classes=20, grid_size=2, width_multiplier=0.1, hidden_units=8)
    write_yolo_v1(other, path, seed=0)
    assert "another network" in refused()
