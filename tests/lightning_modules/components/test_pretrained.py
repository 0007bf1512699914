"""Names of pretrained weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torchvision

from errors import UserError
from lightning_modules.components.pretrained import find_weights


@pytest.mark.parametrize(
    ("network", "name", "file"),
    [
        ("resnet50", "IMAGENET1K_V1", "resnet50-0676ba61.pth"),
        ("resnet50", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("resnet101", "IMAGENET1K_V1", "resnet101-63fe2227.pth"),
        ("vgg16", "IMAGENET1K_V1", "vgg16-397923af.pth"),
    ],
)
def test_a_name_is_one_file(
    network: str, name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / file).touch()
    assert find_weights(network, name) == folder / file
    assert torchvision.models.get_model_weights("resnet50").DEFAULT.name == "IMAGENET1K_V2"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["IMAGENET1K_V3", "imagenet1k_v1", "V1", "default"])
def test_a_wrong_name_lists_the_right_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"IMAGENET1K_V1, IMAGENET1K_V2.*") as error:
        find_weights("resnet50", name)
    assert re.match("weights: expected .*found", str(error.value))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
