"""Frames per second of the detectors with one image at a time: ``python -m benchmarks.detection_fps``.

Measure from the resized uint8 tensor on the device to the final boxes, non-maximum suppression included, and the
network alone with its normalization. Untrained weights predict unusual boxes, so the table lists how many enter the
suppression. SSD300 is compared with torchvision's ssd300_vgg16, which gets the same weights and predicts the same
boxes. The papers' figures have a table of their own: another machine and other software. ``python -m
benchmarks.two_stage_speed`` measures the parts of the R-CNN family.
"""

from __future__ import annotations

import argparse
import importlib
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

from benchmarks.yolo_v2_sizes import frames_a_second
from datamodules.box_transforms import BoxTransform
from datamodules.folders import list_images
from datamodules.image_dataset import ImageDataset
from errors import BrokenImageError, DatasetError, UserError
from lightning_modules.base import VisionModule
from lightning_modules.detection.fast_rcnn import FastRCNN
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.rcnn import RCNN
from lightning_modules.detection.ssd import SSD

#: Class, its arguments and the side of its images, by name.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "YOLOv1": ("lightning_modules.detection.yolo_v1.YOLOv1", {}, 448),
    "YOLOv2": ("lightning_modules.detection.yolo_v2.YOLOv2", {}, 416),
    "SSD300": ("lightning_modules.detection.ssd.SSD", {"variant": "ssd300"}, 300),
    "SSD512": ("lightning_modules.detection.ssd.SSD", {"variant": "ssd512"}, 512),
    "FasterRCNN": ("lightning_modules.detection.faster_rcnn.FasterRCNN", {}, 600),
}
#: As the lecture has it: mean average precision on VOC2007's test set after training on 07+12, and frames a second.
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


def build(path: str, options: dict[str, Any]) -> VisionModule:
    """Build the class at ``path`` with ``options``."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**options)


def system_of(path: str) -> tuple[Any, dict[str, Any]]:
    """Return the class of a checkpoint of ``train.py``, and the arguments of its training data."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path")
    if class_path is None:
        raise UserError(f"{path}: expected a checkpoint that train.py wrote, found no class in it")
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name), checkpoint.get("datamodule_hyper_parameters", {})


def from_checkpoint(path: str) -> tuple[str, VisionModule, int]:
    """Return name, module and image size of a checkpoint of ``train.py``."""
    system, data = system_of(path)
    size = data.get("eval_image_size") or data.get("image_size")
    if not isinstance(size, int):
        raise UserError(f"{path}: expected a detector of square images, found the size {size}")
    return system.__name__, system.load_from_checkpoint(path, map_location="cpu", weights_only=True), size


def peer_of(ours: SSD) -> Any:
    """Return torchvision's SSD300 with the weights of a module, in its own order of layers, and the paper's priors."""
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=ours.num_classes + 1)
    scales = [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]
    aspects = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    theirs.anchor_generator = DefaultBoxGenerator(aspects, scales=scales, steps=[8, 16, 32, 64, 100, 300], clip=False)
    network = ours.network
    backbone: Any = theirs.backbone
    head: Any = theirs.head
    backbone.scale_weight.data.copy_(network.norm.scale)
    for source, destination in (
        ([network.features, network.extras], [backbone.features, backbone.extra]),
        ([network.location], [head.regression_head]),
        ([network.confidence], [head.classification_head]),
    ):
        values, places = ([p for part in parts for p in part.parameters()] for parts in (source, destination))
        for value, place in zip(values, places, strict=True):
            place.data.copy_(value)
    return theirs


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the boxes of each call of torchvision's NMS, by our code and by its own."""
    counts: list[int] = []
    nms = torchvision.ops.batched_nms

    def counting(boxes: Tensor, *arguments: Any) -> Tensor:
        counts.append(len(boxes))
        return nms(boxes, *arguments)

    with (
        mock.patch("lightning_modules.components.boxes.batched_nms", counting),
        mock.patch("torchvision.ops.boxes.batched_nms", counting),
    ):
        yield counts


def row(
    name: str,
    module: nn.Module,
    whole: Callable[[Tensor], object],
    forward: Callable[[Tensor], object] | None,
    images: Sequence[Tensor],
    options: argparse.Namespace,
) -> float:
    """Print a line of the table; return the frames per second to the final boxes."""
    with counted() as counts:
        for image in images:
            whole(image)
    speeds = [
        frames_a_second(function, images, options.warm_up, options.timed, images[0].device)
        for function in (whole, forward)
        if function is not None
    ]
    parameters = sum(p.numel() for p in module.parameters())
    boxes = sum(counts) / len(images)
    line = f"{name:26s} {images[0].shape[-1]:5d} {parameters:12,d} {boxes:8.0f}"
    print(line + "".join(f" {speed:8.1f}" for speed in speeds), flush=True)
    return speeds[0]


def pictures(folder: str | None, size: int, device: torch.device) -> list[Tensor]:
    """Return up to 50 images of a folder, or one of noise: uint8 (1, 3, S, S) on the device."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=generator).to(device)]
    dataset = ImageDataset(list_images(folder)[:50], BoxTransform(size).image_only)
    return [dataset[i]["image"][None].to(device) for i in range(len(dataset))]


def measure(name: str, module: VisionModule, size: int, options: argparse.Namespace, device: torch.device) -> None:
    """Print a line for one of our systems, and for its peer."""
    module.eval().to(device=device, memory_format=module.memory_format)  # type: ignore[call-overload]
    images = pictures(options.images, size, device)
    network: Any = module.network
    peer = peer_of(module) if isinstance(module, SSD) and _is_the_papers(module) else None
    if options.compile:
        network = torch.compile(network)
        module.network = network
    # The R-CNN family has no network to measure alone: its second stage depends on the proposals of the first.
    two_stages = isinstance(module, (RCNN, FastRCNN, FasterRCNN))
    forward = None if two_stages else lambda x: network(module.preprocess(x))
    ours = row(name, module, module.predict, forward, images, options)
    if peer is None:
        return
    peer.eval().to(device=device, memory_format=module.memory_format)  # type: ignore[call-overload]

    def whole(image: Tensor) -> object:
        return peer([image[0].float() / 255])

    def their_forward(image: Tensor) -> object:
        batch, _ = peer.transform([image[0].float() / 255])
        return peer.head(list(peer.backbone(batch.tensors).values()))

    if options.compile:
        peer.backbone, peer.head = torch.compile(peer.backbone), torch.compile(peer.head)
    theirs = row("torchvision ssd300_vgg16", peer, whole, their_forward, images, options)
    print(f"  ratio ours / theirs: {ours / theirs:.2f}, to the final boxes")


def _is_the_papers(module: SSD) -> bool:
    return module.image_size == 300 and len(module.network.features) == 35 and len(module.network.norm.scale) == 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection_fps", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="untrained; default: all")
    what.add_argument("--ckpt_path", nargs="+", help="checkpoints to measure instead")
    parser.add_argument("--num_classes", type=int, default=20, help="classes of untrained models")
    parser.add_argument("--images", help="a folder of images; default: noise")
    parser.add_argument("--warm_up", type=int, default=50 if cuda else 2, help="images; default: %(default)s")
    parser.add_argument("--timed", type=int, default=200 if cuda else 10, help="images; default: %(default)s")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print("measured here, batch of 1, frames per second")
    print(
        f"{machine}, {options.dtype}, {'compiled' if options.compile else 'not compiled'}, torch {torch.__version__}, "
        f"{options.warm_up} images to warm up and {options.timed} timed"
    )
    print(f"{'':26s} {'size':>5s} {'parameters':>12s} {'to NMS':>8s} {'to boxes':>8s} {'network':>8s}")
    torch.manual_seed(0)
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"),
        ):
            if options.ckpt_path:
                for path in options.ckpt_path:
                    measure(*from_checkpoint(path), options, device)
            else:
                for name in options.model:
                    path, arguments_of, size = MODELS[name]
                    module = build(path, {"num_classes": options.num_classes, **arguments_of})
                    measure(f"{name}, untrained", module, size, options, device)
    except (BrokenImageError, DatasetError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\nfrom the papers, not measured here: VOC2007's test set, trained on 07+12, Titan X")
    print(f"{'':26s} {'mAP':>5s} {'FPS':>5s}")
    for name, precision, speed in PAPERS:
        print(f"{name:26s} {precision:5.1f} {speed:5g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
