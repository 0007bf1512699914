"""PSNR of SAE and SWWAE by layer: ``python -m benchmarks.inversion_by_layer --content IMAGES``.

A decoder of each layer is trained with and without the encoder's switches, on the same images in the same order, with
the same parameters and steps. The table has the PSNR of held-out images; inversion_by_layer.png shows one of them and
its reconstructions.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from rich.progress import Progress

from benchmarks.timing import find_device
from cli.command import command, make_folder, require_positive
from datamodules.style.style_images import StyleImages
from lightning_modules.style.inversion_network import PSNR, InversionNetwork
from visualization.drawing import INK, PAPER, load_font, to_pil

LAYERS = ("pool1", "pool2", "pool3", "pool4", "pool5", "fc6", "fc7", "fc8")


def train(layer: str, switches: bool, data: StyleImages, options: argparse.Namespace, tick: object) -> InversionNetwork:
    """Train a decoder for ``options.steps`` steps."""
    pl.seed_everything(0, verbose=False)
    module = InversionNetwork(
        layer, switches, weights=options.weights, image_size=options.size, backbone=options.backbone  # type: ignore[arg-type]
    )  # fmt: skip
    module.setup("fit")
    module.to(options.device)
    optimizer = torch.optim.Adam(module.parameters(), options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loader, step, epoch = data.train_dataloader(), 0, 0
    while step < options.steps:
        loader.sampler.epoch = epoch  # type: ignore[attr-defined]
        for batch in loader:
            with torch.autocast(options.device, torch.bfloat16):
                loss = torch.stack(list(module.losses({"image": batch["image"].to(options.device)}).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            tick()  # type: ignore[operator]
            if step == options.steps:
                break
        epoch += 1
    return module.eval()


@torch.no_grad()
def measure(module: InversionNetwork, data: StyleImages, device: str) -> tuple[float, Image.Image]:
    """Return the PSNR of the held-out images in dB, and the first reconstruction."""
    metric, first = PSNR().to(device), None
    for batch in data.val_dataloader():
        images = batch["image"].to(device)
        reconstructed = module.predict(images)["stylized"]
        metric.update(reconstructed, images)
        first = first or to_pil(reconstructed[0].cpu())
    assert first is not None
    return float(metric.compute()), first


def draw_reconstructions(
    original: Image.Image, rows: dict[str, list[Image.Image]], layers: Sequence[str]
) -> Image.Image:
    """Draw the image and its reconstructions: one column per layer, one row per method."""
    tile, gap, head, side = 128, 4, 24, 72
    canvas = Image.new("RGB", (side + (len(layers) + 1) * (tile + gap), head + len(rows) * (tile + gap)), PAPER)
    draw, font = ImageDraw.Draw(canvas), load_font(13)
    for column, title in enumerate(["image", *layers]):
        draw.text((side + column * (tile + gap) + 4, head / 2), title, fill=INK, font=font, anchor="lm")
    for i, (name, images) in enumerate(rows.items()):
        top = head + i * (tile + gap)
        draw.text((4, top + tile / 2), name, fill=INK, font=font, anchor="lm")
        for column, image in enumerate([original, *images]):
            canvas.paste(image.resize((tile, tile)), (side + column * (tile + gap), top))
    return canvas


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the figure; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion_by_layer", description=__doc__)
    parser.add_argument("--content", required=True, help="folder of images; one in ten is held out")
    parser.add_argument(
        "--layers", nargs="+", default=list(LAYERS), choices=LAYERS, metavar="LAYER", help="layers to invert"
    )
    parser.add_argument("--backbone", default="vgg16", choices=("vgg16", "vgg19"), help="encoder")
    parser.add_argument("--weights", default="DEFAULT", help="weights of the encoder: DEFAULT, a file, or random")
    parser.add_argument("--steps", type=int, default=500, help="steps per layer")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--size", type=int, default=64, help="side of the crops in pixels, 32 or more")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="learning rate of Adam, with cosine decay")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--figure", default="inversion_by_layer.png", help="file of the figure")
    options = parser.parse_args(arguments)
    require_positive(options, "steps", "batch_size", "size")
    find_device(options.device)
    make_folder("figure", os.path.dirname(options.figure) or ".")
    warnings.filterwarnings("ignore", message=".*none is held out")
    size = {"image_size": options.size, "batch_size": options.batch_size}
    data = StyleImages(content=options.content, with_style=False, num_workers=0, seed=0, **size)
    original = to_pil(next(iter(data.val_dataloader()))["image"][0])
    rows: dict[str, list[Image.Image]] = {"SAE": [], "SWWAE": []}
    print(f"PSNR in dB after {options.steps} steps", flush=True)
    print(f"{'layer':6} {'parameters':>12} {'SAE':>7} {'SWWAE':>7} {'gain':>7}", flush=True)
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=2 * len(options.layers) * options.steps)
        for layer in options.layers:
            psnr = []
            for name, switches in (("SAE", False), ("SWWAE", True)):
                module = train(layer, switches, data, options, lambda: progress.advance(task))
                value, image = measure(module, data, options.device)
                psnr.append(value)
                rows[name].append(image)
            count = sum(p.numel() for p in module.parameters())
            print(f"{layer:6} {count:12,} {psnr[0]:7.2f} {psnr[1]:7.2f} {psnr[1] - psnr[0]:+7.2f}", flush=True)
    draw_reconstructions(original, rows, options.layers).save(options.figure)
    print(f"figure: {options.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
