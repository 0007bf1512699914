"""A content image and a style image for tests of the systems that optimize an image."""

from __future__ import annotations

import pytest

from datamodules.synthetic.style_images import write_style_images


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("images")
    write_style_images(str(folder), contents=1, styles=1, size=40)
    return {name: str(next((folder / name).iterdir())) for name in ("content", "style")}
