"""Figures of optimized images: ``python -m benchmarks.style_figures --content PHOTO --style A B C D``.

- ``inversion.png``: a photograph inverted from several layers;
- ``textures.png``: a texture synthesized with one more layer each time;
- ``row.png``: neural style with increasing style weights;
- ``styles.png``: neural style with each style image.

Synthetic images are used by default. All figures take half an hour at 128 pixels, 100 steps and one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image, ImageDraw

from benchmarks.image_optimization import BACKBONES, lbfgs, silence_trainer
from cli.command import command, make_folder, require_positive
from datamodules.style.style_images import ImagePair
from datamodules.synthetic.style_images import write_style_images
from lightning_modules.style.base import OptimizedImage
from lightning_modules.style.feature_inversion import FeatureInversion
from lightning_modules.style.neural_style import NeuralStyle
from lightning_modules.style.texture_synthesis import LAYERS, TextureSynthesis
from visualization.drawing import INK, PAPER, fit_square, load_font, shorten, to_pil

INVERTED_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1", "pool5", "logprob")
STYLE_WEIGHTS = (0.01, 0.1, 1.0, 10.0, 100.0)
TILE = 192  # pixels, side of an image in a figure

Titled = tuple[str, Image.Image]


def optimize(module: OptimizedImage, data: ImagePair, folder: Path) -> tuple[Image.Image, float]:
    """Return the image after one epoch, and its last loss."""
    trainer = pl.Trainer(
        max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    prediction = module.predict([])
    return to_pil(prediction["stylized"][0]), float(trainer.callback_metrics["train/loss"])


def figure_inversion(options: argparse.Namespace) -> list[list[Titled]]:
    """Return the photograph and its inversion from each layer."""
    data = ImagePair(options.content, None, options.size, steps=options.steps)
    tiles = [("photograph", source_image(data, "image"))]
    for layer in options.layers:
        module = FeatureInversion(
            layer, tv_weight_of(layer, options.weights), backbone=options.backbone, weights=options.weights,
            pooling="average", optimizer=lbfgs, alpha_weight=8e-10,
        )  # fmt: skip
        tiles.append(optimized_tile(layer, module, data, options))
    return [tiles]


def tv_weight_of(layer: str, weights: str) -> float:
    """Return the weight of the total variation: the authors' for AlexNet, at the corresponding depth of VGG.

    Random features preserve more of the image: 0.001 suffices to remove the initial noise.
    """
    block = layer.removeprefix("relu").removeprefix("conv").removeprefix("pool")[:1]
    return 0.001 if weights == "random" else {"1": 1.0, "2": 1.0, "3": 10.0, "4": 10.0}.get(block, 100.0)


def figure_textures(options: argparse.Namespace) -> list[list[Titled]]:
    """Return the texture and its synthesis from the first layer, the first two layers and so on."""
    data = ImagePair(options.style[0], None, options.size, steps=options.steps)
    tiles = [("texture", source_image(data, "image"))]
    for depth in range(1, len(LAYERS) + 1):
        module = TextureSynthesis(
            LAYERS[:depth], options.weights == "random", backbone=options.backbone, weights=options.weights
        )
        title = LAYERS[0] if depth == 1 else f"to {LAYERS[depth - 1]}"
        tiles.append(optimized_tile(title, module, data, options))
    return [tiles]


def figure_row(options: argparse.Namespace) -> list[list[Titled]]:
    """Return the photograph, results with increasing style weights, and the style image."""
    data = ImagePair(options.content, options.style[0], options.size, steps=options.steps)
    tiles = [("content", source_image(data, "image"))]
    for weight in STYLE_WEIGHTS:
        module = NeuralStyle(style_weight=weight, backbone=options.backbone, weights=options.weights)
        tiles.append(optimized_tile(f"style weight {weight:g}", module, data, options))
    return [[*tiles, ("style", source_image(data, "style"))]]


def figure_styles(options: argparse.Namespace) -> list[list[Titled]]:
    """Return the style images in one row and the stylized photograph below each."""
    top, bottom = [], []
    for path in options.style:
        data = ImagePair(options.content, path, options.size, steps=options.steps)
        module = NeuralStyle(style_weight=options.style_weight, backbone=options.backbone, weights=options.weights)
        title = Path(path).stem
        top.append((title, source_image(data, "style")))
        bottom.append(optimized_tile(title, module, data, options))
    return [[("photograph", source_image(data, "image")), *top], [("", Image.new("RGB", (1, 1), PAPER)), *bottom]]


def optimized_tile(title: str, module: OptimizedImage, data: ImagePair, options: argparse.Namespace) -> Titled:
    """Optimize an image, print its loss and time, and return its tile."""
    start = time.perf_counter()
    image, loss = optimize(module, data, options.out)
    print(f"  {title:14s} loss {loss:.4g}, {time.perf_counter() - start:.0f} s", flush=True)
    return title, image


def source_image(data: ImagePair, key: str) -> Image.Image:
    """Return an image as the module receives it."""
    return to_pil(data.dataset("val")[0][key])


def draw_figure(rows: list[list[Titled]], caption: str) -> Image.Image:
    """Draw rows of tiles with titles, below a caption."""
    gap, line, font = 8, 26, load_font(14)
    columns = max(len(tiles) for tiles in rows)
    canvas = Image.new("RGB", (columns * (TILE + gap) + gap, line + len(rows) * (TILE + line) + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, line // 2), shorten(caption, font, canvas.width - 2 * gap), fill=INK, font=font, anchor="lm")
    for i, tiles in enumerate(rows):
        for j, (title, image) in enumerate(tiles):
            left, top = gap + j * (TILE + gap), line + i * (TILE + line)
            draw.text((left, top + line // 2), shorten(title, font, TILE), fill=INK, font=font, anchor="lm")
            canvas.paste(fit_square(image, TILE) if title else image, (left, top + line))
    return canvas


FIGURES = {"inversion": figure_inversion, "textures": figure_textures, "row": figure_row, "styles": figure_styles}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_figures", description=__doc__)
    parser.add_argument("--content", help="content image; default: a synthetic scene")
    parser.add_argument("--style", nargs="+", help="style images; default: four synthetic textures")
    parser.add_argument("--out", type=Path, default=Path("runs/style_figures"), help="folder; default: %(default)s")
    parser.add_argument("--figures", nargs="+", choices=list(FIGURES), default=list(FIGURES), help="default: all")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg19", help="default: %(default)s")
    parser.add_argument("--weights", default="DEFAULT", help="as --model.weights; default: %(default)s")
    parser.add_argument("--layers", nargs="+", default=INVERTED_LAYERS, help="layers to invert; default: %(default)s")
    parser.add_argument(
        "--style_weight", type=float, default=1.0, help="style weight of styles.png; default: %(default)s"
    )
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels; default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="steps of L-BFGS per image; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "size", "steps")
    silence_trainer()
    make_folder("out", str(options.out))
    if options.content is None or options.style is None:
        folder = options.out / "synthetic"
        write_style_images(str(folder), contents=1, styles=4, size=options.size)
        options.content = options.content or str(min((folder / "content").iterdir()))
        options.style = options.style or sorted(str(path) for path in (folder / "style").iterdir())
    for name in options.figures:
        print(f"{name}:", flush=True)
        rows = FIGURES[name](options)
        random = ", random features" if options.weights == "random" else ""
        caption = f"{name}: {options.backbone}{random}, {options.steps} steps of L-BFGS"
        draw_figure(rows, caption).save(options.out / f"{name}.png")
        print(f"  {options.out / name}.png", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
