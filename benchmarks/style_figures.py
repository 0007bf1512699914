"""The lecture's figures of learned images: ``python -m benchmarks.style_figures --content PHOTO --style A B C D``.

Four images, made by the modules that train.py runs: ``inversion.png``, what each layer knows of a photograph, up to
its log-probabilities; ``textures.png``, a style's texture by one layer more each time; ``row.png``, one photograph from
content to style; ``styles.png``, one photograph in each style. Without images drawn ones are taken. As fast as the
lecture's they are not: at 128 pixels, 100 steps and one core it takes half an hour; ``--figures`` makes some of them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw

from datamodules.style.style_images import ImagePair
from datamodules.synthetic.style_images import write_style_images
from lightning_modules.style.feature_inversion import FeatureInversion
from lightning_modules.style.learned_image import LearnedImage
from lightning_modules.style.neural_style import NeuralStyle
from lightning_modules.style.texture_synthesis import LAYERS, TextureSynthesis
from visualization.drawing import INK, PAPER, fit, load_font, shorten, to_picture

FIGURES = ("inversion", "textures", "row", "styles")
NETWORKS = ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
INVERTED = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1", "pool5", "logprob")
RATIOS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of style to content
TILE = 192  # pixels, the side of an image in a figure

Titled = tuple[str, Image.Image]


def learn(module: LearnedImage, data: ImagePair, folder: Path) -> tuple[Image.Image, float]:
    """The image after the steps of one epoch, and its last loss."""
    trainer = pl.Trainer(
        max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    found = module.predict([])
    return to_picture(found["stylized"][0]), float(trainer.callback_metrics["train/loss"])


def inversion(options: argparse.Namespace) -> list[list[Titled]]:
    """The photograph, and what is found from each layer's activations alone."""
    data = ImagePair(options.content, None, options.size, steps=options.steps)
    tiles = [("photograph", source_of(data, "image"))]
    for layer in options.layers:
        module = FeatureInversion(
            layer, prior_of(layer, options.weights), network=options.network, weights=options.weights,
            pooling="average", optimizer=lbfgs, alpha_weight=8e-10,
        )  # fmt: skip
        tiles.append(made(layer, module, data, options))
    return [tiles]


def prior_of(layer: str, weights: str) -> float:
    """The weight of the total variation: the authors', of AlexNet's layers, at the depth of VGG's.

    Random features forget less: a thousandth takes away the noise of the beginning, which deep ones do not see.
    """
    block = layer.removeprefix("relu").removeprefix("conv").removeprefix("pool")[:1]
    return 0.001 if weights == "random" else {"1": 1.0, "2": 1.0, "3": 10.0, "4": 10.0}.get(block, 100.0)


def textures(options: argparse.Namespace) -> list[list[Titled]]:
    """The style, and a texture by its first layer, its first two and so on."""
    data = ImagePair(options.style[0], None, options.size, steps=options.steps)
    tiles = [("texture", source_of(data, "image"))]
    for depth in range(1, len(LAYERS) + 1):
        module = TextureSynthesis(
            LAYERS[:depth], options.weights == "random", network=options.network, weights=options.weights
        )
        title = LAYERS[0] if depth == 1 else f"to {LAYERS[depth - 1]}"
        tiles.append(made(title, module, data, options))
    return [tiles]


def row(options: argparse.Namespace) -> list[list[Titled]]:
    """The photograph, images of ever more style, the style."""
    data = ImagePair(options.content, options.style[0], options.size, steps=options.steps)
    tiles = [("content", source_of(data, "image"))]
    for ratio in RATIOS:
        module = NeuralStyle(style_weight=ratio, network=options.network, weights=options.weights)
        tiles.append(made(f"style x {ratio:g}", module, data, options))
    return [[*tiles, ("style", source_of(data, "style"))]]


def styles(options: argparse.Namespace) -> list[list[Titled]]:
    """The styles in one row, below each the photograph in it."""
    above, below = [], []
    for path in options.style:
        data = ImagePair(options.content, path, options.size, steps=options.steps)
        module = NeuralStyle(style_weight=options.style_weight, network=options.network, weights=options.weights)
        title = Path(path).stem
        above.append((title, source_of(data, "style")))
        below.append(made(title, module, data, options))
    return [[("photograph", source_of(data, "image")), *above], [("", Image.new("RGB", (1, 1), PAPER)), *below]]


def made(title: str, module: LearnedImage, data: ImagePair, options: argparse.Namespace) -> Titled:
    """A tile of a learned image; a line says what it took."""
    start = time.perf_counter()
    image, loss = learn(module, data, options.out)
    print(f"  {title:14s} loss {loss:.4g}, {time.perf_counter() - start:.0f} s", flush=True)
    return title, image


def source_of(data: ImagePair, key: str) -> Image.Image:
    """The image as the module sees it."""
    return to_picture(data.dataset("val")[0][key])


def lbfgs(params: object) -> torch.optim.Optimizer:
    """One iteration a step, as the other systems have it; much faster here than the authors' gradient descent."""
    return torch.optim.LBFGS(params, lr=1.0, max_iter=1, history_size=20)  # type: ignore[arg-type]


def figure_of(rows: list[list[Titled]], caption: str) -> Image.Image:
    """Rows of tiles, each under its title; the caption on top."""
    gap, line, font = 8, 26, load_font(14)
    columns = max(len(tiles) for tiles in rows)
    canvas = Image.new("RGB", (columns * (TILE + gap) + gap, line + len(rows) * (TILE + line) + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, line // 2), shorten(caption, font, canvas.width - 2 * gap), fill=INK, font=font, anchor="lm")
    for i, tiles in enumerate(rows):
        for j, (title, picture) in enumerate(tiles):
            left, top = gap + j * (TILE + gap), line + i * (TILE + line)
            draw.text((left, top + line // 2), shorten(title, font, TILE), fill=INK, font=font, anchor="lm")
            canvas.paste(fit(picture, TILE) if title else picture, (left, top + line))
    return canvas


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the figures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_figures", description=__doc__)
    parser.add_argument("--content", help="a photograph; default: a drawn scene")
    parser.add_argument("--style", nargs="+", help="styles, the lecture has four; default: four drawn textures")
    parser.add_argument("--out", type=Path, default=Path("runs/style_figures"), help="folder; default: %(default)s")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=FIGURES, help="default: all")
    parser.add_argument("--network", choices=NETWORKS, default="vgg19", help="default: %(default)s")
    parser.add_argument("--weights", default="DEFAULT", help="as --model.weights, or random; default: %(default)s")
    parser.add_argument("--layers", nargs="+", default=INVERTED, help="that are inverted; default: %(default)s")
    parser.add_argument("--style_weight", type=float, default=1.0, help="of styles.png; default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels; default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="of L-BFGS an image; default: %(default)s")
    options = parser.parse_args(arguments)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.content is None or options.style is None:
            drawn = options.out / "drawn"
            write_style_images(str(drawn), contents=1, styles=4, size=options.size)
            options.content = options.content or str(min((drawn / "content").iterdir()))
            options.style = options.style or sorted(str(path) for path in (drawn / "style").iterdir())
        for name in options.figures:
            print(f"{name}:", flush=True)
            rows = {"inversion": inversion, "textures": textures, "row": row, "styles": styles}[name](options)
            random = ", random features" if options.weights == "random" else ""
            caption = f"{name}: {options.network}{random}, {options.steps} steps of L-BFGS"
            figure_of(rows, caption).save(options.out / f"{name}.png")
            print(f"  {options.out / name}.png", flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"style_figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
