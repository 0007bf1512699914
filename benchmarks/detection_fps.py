"""Frames per second of the detectors, one image at a time: ``python -m benchmarks.detection_fps``.

Measure from the resized uint8 tensor on the device to the final boxes, non-maximum suppression (NMS) included, and the
network alone with its normalization. Untrained weights predict unusual boxes, so the table lists how many enter NMS.
The ratios compare each system with the first one, and SSD300 with torchvision's ssd300_vgg16, which gets the same
weights and predicts the same boxes. The papers' figures are in a separate table: other machines and other software.
``python -m benchmarks.two_stage_speed`` measures the parts of the R-CNN family.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

from benchmarks.checkpoints import load_system
from benchmarks.timing import describe_device, find_device, frames_per_second
from cli.command import command, require_positive
from datamodules.box_transforms import BoxTransform
from datamodules.folders import list_images
from datamodules.image_dataset import ImageDataset
from errors import CheckpointError
from lightning_modules.base import VisionModule
from lightning_modules.components.boxes import grouped_nms
from lightning_modules.detection.fast_rcnn import FastRCNN
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.rcnn import RCNN
from lightning_modules.detection.ssd import SSD
from lightning_modules.detection.yolo_v1 import YOLOv1
from lightning_modules.detection.yolo_v2 import YOLOv2

MAX_IMAGES = 50  # of a folder
#: Class, its arguments and the side of its images in pixels, by name.
MODELS: dict[str, tuple[Callable[..., VisionModule], dict[str, Any], int]] = {
    "YOLOv1": (YOLOv1, {}, 448),
    "YOLOv2": (YOLOv2, {}, 416),
    "SSD300": (SSD, {"variant": "ssd300"}, 300),
    "SSD512": (SSD, {"variant": "ssd512"}, 512),
    "FasterRCNN": (FasterRCNN, {}, 600),
}
#: The lecture's table: mAP on VOC 2007 test in percent after training on 07+12, and frames per second.
PAPERS = (
    ("Fast R-CNN", 70.0, 0.5),
    ("Faster R-CNN VGG16", 73.2, 7),
    ("Faster R-CNN ResNet", 76.4, 5),
    ("YOLO", 63.4, 45),
    ("SSD300", 74.3, 46),
    ("SSD512", 76.8, 19),
    ("YOLOv2 at 288", 69.0, 91),
    ("YOLOv2 at 352", 73.7, 81),
    ("YOLOv2 at 416", 76.8, 67),
    ("YOLOv2 at 480", 77.8, 59),
    ("YOLOv2 at 544", 78.6, 40),
)


def load_detector(path: str) -> tuple[str, VisionModule, int]:
    """Return the name, the system and the image size of a checkpoint of ``train.py``."""
    module, data = load_system(path)
    size = data.get("eval_image_size") or data.get("image_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{path}: expected a detector of square images, found the size {size}")
    return type(module).__name__, module, size


def is_ssd300_of_the_paper(module: VisionModule) -> bool:
    """Whether torchvision's SSD300 has the same layers."""
    return (
        isinstance(module, SSD)
        and module.image_size == 300
        and len(module.network.features) == 35
        and len(module.network.norm.scale) == 512
    )


def torchvision_ssd300(ours: SSD) -> Any:
    """Return torchvision's SSD300 with the weights of ours and the paper's priors."""
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=ours.num_classes + 1)
    scales = [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]
    aspects = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    theirs.anchor_generator = DefaultBoxGenerator(aspects, scales=scales, steps=[8, 16, 32, 64, 100, 300], clip=False)
    network = ours.network
    backbone: Any = theirs.backbone
    head: Any = theirs.head
    backbone.scale_weight.data.copy_(network.norm.scale)
    for sources, destinations in (
        ([network.features, network.extras], [backbone.features, backbone.extra]),
        ([network.location], [head.regression_head]),
        ([network.confidence], [head.classification_head]),
    ):
        source, destination = ([p for m in modules for p in m.parameters()] for modules in (sources, destinations))
        for ours_parameter, theirs_parameter in zip(source, destination, strict=True):
            theirs_parameter.data.copy_(ours_parameter)
    return theirs


@contextmanager
def count_nms_boxes() -> Iterator[list[int]]:
    """Count the boxes of each suppression, in our code and in torchvision's."""
    counts: list[int] = []

    def counting(nms: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(boxes: Tensor, *arguments: Any) -> Tensor:
            counts.append(len(boxes))
            return nms(boxes, *arguments)

        return call

    with (
        mock.patch("lightning_modules.components.boxes.grouped_nms", counting(grouped_nms)),
        mock.patch("torchvision.ops.boxes.batched_nms", counting(torchvision.ops.batched_nms)),
    ):
        yield counts


def print_row(
    name: str,
    module: nn.Module,
    detect: Callable[[Tensor], object],
    forward: Callable[[Tensor], object] | None,
    images: Sequence[Tensor],
    options: argparse.Namespace,
) -> float:
    """Print a row of the table.

    Args:
        name: first column.
        module: its parameters are counted.
        detect: computes the final boxes of an image.
        forward: computes the network's output of an image; None omits the column.
        images: uint8 (1, 3, S, S) on the device.
        options: ``warm_up`` and ``timed`` are numbers of images.

    Returns:
        Frames per second to the final boxes.
    """
    with count_nms_boxes() as counts:
        for image in images:
            detect(image)
    functions = [detect] if forward is None else [detect, forward]
    speeds = [frames_per_second(function, images, options.warm_up, options.timed) for function in functions]
    parameters = sum(p.numel() for p in module.parameters())
    row = f"{name:26s} {images[0].shape[-1]:5d} {parameters:12,d} {sum(counts) / len(images):8.0f}"
    print(row + "".join(f" {speed:8.1f}" for speed in speeds), flush=True)
    return speeds[0]


def load_images(folder: str | None, size: int, device: torch.device) -> list[Tensor]:
    """Return the first images of a folder, or one of noise: uint8 (1, 3, S, S) on the device."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=generator).to(device)]
    dataset = ImageDataset(list_images(folder)[:MAX_IMAGES], BoxTransform(size).image_only)
    return [dataset[i]["image"][None].to(device) for i in range(len(dataset))]


def measure_system(
    name: str, module: VisionModule, size: int, options: argparse.Namespace, device: torch.device
) -> float:
    """Print a row for a system, and one for its peer; return the system's frames per second to the final boxes."""
    module.eval().to(device=device, memory_format=module.memory_format)  # type: ignore[call-overload]
    images = load_images(options.images, size, device)
    network: Any = module.network
    peer = torchvision_ssd300(module) if isinstance(module, SSD) and is_ssd300_of_the_paper(module) else None
    if options.compile:
        network = torch.compile(network)
        module.network = network
    # The second stage of the R-CNN family depends on the proposals of the first: there is no network to measure alone.
    two_stages = isinstance(module, (RCNN, FastRCNN, FasterRCNN))
    forward = None if two_stages else lambda x: network(module.preprocess(x))
    ours = print_row(name, module, module.predict, forward, images, options)
    if peer is None:
        return ours
    peer.eval().to(device=device, memory_format=module.memory_format)  # type: ignore[call-overload]

    def detect(image: Tensor) -> object:
        return peer([image[0].float() / 255])

    def peer_forward(image: Tensor) -> object:
        batch, _ = peer.transform([image[0].float() / 255])
        return peer.head(list(peer.backbone(batch.tensors).values()))

    if options.compile:
        peer.backbone, peer.head = torch.compile(peer.backbone), torch.compile(peer.head)
    theirs = print_row("torchvision ssd300_vgg16", peer, detect, peer_forward, images, options)
    print(f"  ratio {ours / theirs:.2f}: frames per second, {name} / torchvision ssd300_vgg16")
    return ours


def load_systems(options: argparse.Namespace) -> Iterator[tuple[str, VisionModule, int]]:
    """Yield the name, the system and the image size of each system to measure."""
    if options.ckpt_path:
        yield from map(load_detector, options.ckpt_path)
        return
    for name in options.model:
        system, arguments, size = MODELS[name]
        yield f"{name}, untrained", system(num_classes=options.num_classes, **arguments), size


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection_fps", description=__doc__)
    systems = parser.add_mutually_exclusive_group()
    systems.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="untrained; default: all")
    systems.add_argument("--ckpt_path", nargs="+", help="checkpoints to measure instead")
    parser.add_argument("--num_classes", type=int, default=20, help="classes of untrained models; default: %(default)s")
    parser.add_argument("--images", help="folder of images; default: noise")
    parser.add_argument("--warm_up", type=int, default=50 if cuda else 2, help="untimed images; default: %(default)s")
    parser.add_argument("--timed", type=int, default=200 if cuda else 10, help="timed images; default: %(default)s")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    options = parser.parse_args(arguments)
    require_positive(options, "num_classes", "timed")
    device = find_device(options.device)
    print("measured here, batch size 1, frames per second")
    print(
        f"{describe_device(device)}, {options.dtype}, {'compiled' if options.compile else 'not compiled'}, "
        f"{options.warm_up} warm-up images, {options.timed} timed images"
    )
    print(f"{'':26s} {'size':>5s} {'parameters':>12s} {'to NMS':>8s} {'to boxes':>8s} {'network':>8s}")
    torch.manual_seed(0)
    speeds: list[tuple[str, float]] = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        for name, module, size in load_systems(options):
            speeds.append((name, measure_system(name, module, size, options, device)))
    for name, speed in speeds[1:]:
        print(f"ratio {speed / speeds[0][1]:.2f}: frames per second, {name} / {speeds[0][0]}")
    print("\nfrom the papers, not measured here: VOC 2007 test, trained on 07+12, Titan X")
    print(f"{'':26s} {'mAP':>5s} {'FPS':>5s}")
    for name, mean_ap, speed in PAPERS:
        print(f"{name:26s} {mean_ap:5.1f} {speed:5g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
