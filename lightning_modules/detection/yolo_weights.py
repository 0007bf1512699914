"""Weights of YOLO and YOLOv2 from a file: the authors' darknet files and our checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from errors import UserError
from lightning_modules.components.pretrained import load_weights, read_torch_file
from lightning_modules.detection.darknet19 import darknet_layers, load_darknet_weights


class LoadedWeights(NamedTuple):
    """What a file of weights contained.

    Attributes:
        is_darknet_detector: whether it is a darknet file with all layers of the network.
        class_names: one name per class; None if they are unknown.
    """

    is_darknet_detector: bool
    class_names: list[str] | None


def load_detector(network: nn.Module, path: Path, name: str, num_classes: int) -> LoadedWeights:
    """Load a darknet file, see `load_darknet_weights`, or one of our checkpoints.

    Args:
        network: the network of a detector, on the CPU.
        path: the file.
        name: name of the detector, for messages.
        num_classes: number of classes of the network.

    Raises:
        UserError: the file is damaged or belongs to another network.
    """
    if not is_torch_file(path):
        whole = load_darknet_weights(network, path) == len(darknet_layers(network))
        return LoadedWeights(whole, published_class_names(num_classes) if whole else None)
    hparams = read_torch_file(path).get("hyper_parameters", {})
    trained = hparams.get("num_classes", num_classes)
    if trained != num_classes:
        raise UserError(
            f"num_classes: expected {trained}, as in the checkpoint {path}, found {num_classes}; "
            f"set --model.num_classes {trained} and the data's classes"
        )
    load_weights(network, path, name, convert=drop_module_buffers)
    names = hparams.get("class_names")
    return LoadedWeights(False, list(names) if names else None)


def published_class_names(num_classes: int) -> list[str] | None:
    """Return the class names of the authors' detectors: VOC's for 20 classes, COCO's for 80, else None."""
    voc = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]
    coco = [name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] if name != "N/A"]
    return {len(voc): list(voc), len(coco): coco}.get(num_classes)


def is_torch_file(path: Path) -> bool:
    """Whether a file starts like one of ``torch.save``: a zip archive, or a pickle in the format before PyTorch 1.6."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def is_checkpoint_of(path: Path, parameter: str) -> bool:
    """Whether a file is a checkpoint or state dict with this parameter of a system's network."""
    content = read_torch_file(path) if is_torch_file(path) else {}
    return not {parameter, f"network.{parameter}"}.isdisjoint(content.get("state_dict", content))


def drop_module_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop YOLOv2's count of training images, which is not part of the network."""
    return {key: value for key, value in state.items() if key != "seen"}
