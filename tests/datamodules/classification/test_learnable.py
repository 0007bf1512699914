"""A small network learns the labels of drawn dishes and scenes, but not shuffled labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from datamodules.classification.base import ClassificationData
from datamodules.classification.food101 import Food101
from datamodules.classification.places365 import Places365
from datamodules.synthetic.food101 import write_food101
from datamodules.synthetic.places365 import write_places365
from lightning_modules.components.resnet_cifar import ResNetCifar

CLASSES, SIDE = 4, 24


def tensors(data: ClassificationData, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split in -1..1 and their labels, read as in evaluation."""
    data.train_transform = data.eval_transform  # type: ignore[assignment]
    samples = data.dataset(split)  # type: ignore[arg-type]
    images = torch.stack([samples[i]["image"] for i in range(len(samples))])
    return images / 127.5 - 1, torch.from_numpy(data.labels(split))  # type: ignore[arg-type]


def accuracy_after_training(data: ClassificationData, shuffled: bool) -> float:
    """Validation accuracy of a small residual network."""
    torch.manual_seed(0)
    (images, labels), (val_images, val_labels) = tensors(data, "train"), tensors(data, "val")
    if shuffled:
        labels = labels[torch.randperm(len(labels))]
    network, epochs, batch = ResNetCifar(8, CLASSES, base_channels=8), 8, 24
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * -(-len(labels) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(batch):
            optimizer.zero_grad()
            flip = torch.rand(len(chosen), 1, 1, 1) < 0.5
            F.cross_entropy(
                network(torch.where(flip, images[chosen].flip(3), images[chosen])), labels[chosen]
            ).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        return (network(val_images).argmax(1) == val_labels).float().mean().item()


@pytest.mark.parametrize(
    ("write", "dataset"), [(write_food101, Food101), (write_places365, Places365)], ids=["food101", "places365"]
)
def test_the_label_can_be_learned(
    tmp_path: Path, write: Callable[..., object], dataset: type[ClassificationData]
) -> None:
    write(str(tmp_path), classes=CLASSES, train=60, val=40, size=48)
    data = dataset(str(tmp_path), image_size=SIDE)
    assert accuracy_after_training(data, shuffled=False) > 0.75
    assert accuracy_after_training(data, shuffled=True) < 0.45
