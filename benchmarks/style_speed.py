"""Speed of style transfer: ``python -m benchmarks.style_speed``.

``neural_style``: `NeuralStyle`, run by the Trainer, against PyTorch's tutorial (`benchmarks.style_tutorial`). Features,
loss weights, initial image, optimizer and steps are equal; the final losses are compared. The peers:

- ``targets recomputed``: the style goes through the network before each step;
- ``tutorial``: targets are stored; gradients of the network's weights are computed but not used, as in the tutorial;
- ``tutorial, frozen``: without these gradients.

All alternate step by step, so that other load on the machine affects all of them.

``one_pass``: milliseconds per image, from uint8 to uint8, of the feed-forward systems, 500 steps of neural style at the
same size, and the papers' numbers for a Titan X.

``curve``, with ``--fast_style CHECKPOINT``: steps of L-BFGS from noise until the loss is below that of one pass of the
network, on images that were not trained on (Johnson et al. 2016, figure 5).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.checkpoints import load_system
from benchmarks.image_optimization import BACKBONES, lbfgs, silence_trainer
from benchmarks.style_tutorial import Tutorial
from benchmarks.timing import now
from cli.command import command, make_folder, require_positive
from datamodules.folders import list_images
from datamodules.style.style_images import ImagePair
from datamodules.synthetic.style_images import write_style_images
from datamodules.transforms import EvalTransform
from errors import UserError
from lightning_modules.components.features import Features
from lightning_modules.style.adain import AdaIN
from lightning_modules.style.fast_style import FastStyle
from lightning_modules.style.image_optimization import limit_step
from lightning_modules.style.neural_style import NeuralStyle
from lightning_modules.style.style_prediction import StylePrediction

WARM_UP_STEPS = 2  # not timed
MIN_SIZE = 32  # pixels, of one_pass; VGG halves the size five times
MAX_LOSS_DIFFERENCE = 0.05  # relative; rounding errors grow with the steps
PEERS = {"targets recomputed": (True, False), "tutorial": (False, False), "tutorial, frozen": (False, True)}
#: Seconds per image on a Titan X at 256, 512 and 1024 pixels, from the papers.
PAPER_SECONDS = {
    "neural style, 500 steps": {256: 15.86, 512: 54.85, 1024: 214.44},
    "FastStyle": {256: 0.015, 512: 0.05, 1024: 0.21},
    "AdaIN": {256: 0.018, 512: 0.065},
}


class Alternate(pl.Callback):
    """Take a step of each peer after each step of the module; ``seconds`` are the sums after the warm-up."""

    def __init__(self) -> None:
        self.peers: dict[str, Tutorial] = {}
        self.seconds = dict.fromkeys(("ours", *PEERS), 0.0)
        self._since = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.peers:
            assert isinstance(pl_module, NeuralStyle)
            assert pl_module.image is not None
            pl_module.prepare_targets(batch)  # rescales the filters
            assert pl_module.features is not None
            features = pl_module.features.network
            assert isinstance(features, Features)
            content, style = batch["image"].float() / 255, batch["style"].float() / 255
            init = pl_module.image.detach()
            self.peers = {name: Tutorial(features, content, style, init, *options) for name, options in PEERS.items()}
            self._since = now(device())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Ours starts at the end of the last peer and includes all work of the Trainer between two steps.
        for name in self.seconds:
            if name != "ours":
                self.peers[name].step()
            start, self._since = self._since, now(device())
            if batch_idx >= WARM_UP_STEPS:
                self.seconds[name] += self._since - start


def neural_style(options: argparse.Namespace) -> int:
    """Print the ratios; return 1 if the losses differ."""
    with tempfile.TemporaryDirectory() as folder:
        content, style = options.content, options.style
        if content is None or style is None:
            write_style_images(folder, contents=1, styles=1, size=max(options.size, 16))
            content, style = content or f"{folder}/content/000.jpg", style or f"{folder}/style/stripes_00.jpg"
        alternate = Alternate()
        trainer = pl.Trainer(
            max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder, callbacks=[alternate],
        )  # fmt: skip
        module = NeuralStyle(backbone=options.backbone, weights=options.weights)
        trainer.fit(module, datamodule=ImagePair(content, style, options.size, steps=options.steps))
    losses = {"ours": float(trainer.callback_metrics["train/loss"])}
    losses |= {name: float(peer.loss) for name, peer in alternate.peers.items()}
    timed_steps = options.steps - WARM_UP_STEPS
    assert module.image is not None
    height, width = module.image.shape[-2:]
    print(
        f"neural style, {width}x{height}, {options.backbone}, weights {options.weights}, {options.steps} steps on "
        f"{module.image.device.type}"
    )
    for name, seconds in alternate.seconds.items():
        print(f"  {name:20s} {1e3 * seconds / timed_steps:8.1f} ms per step, loss {losses[name]:.5g}")
    for name in PEERS:
        print(f"ratio {alternate.seconds[name] / alternate.seconds['ours']:.2f}: seconds, {name} / ours")
    difference = max(abs(loss / losses["ours"] - 1) for loss in losses.values())
    print(f"largest relative difference of the losses: {100 * difference:.2g} %")
    if not difference <= MAX_LOSS_DIFFERENCE:
        print("error: the losses differ", file=sys.stderr)
        return 1
    return 0


def device() -> torch.device:
    """Return the device that the Trainer selects."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def seconds_per_image(predict: Callable[[], Any], repeats: int) -> float:
    """Return the mean of ``repeats`` calls after a warm-up."""
    predict()
    start = now(device())
    for _ in range(repeats):
        predict()
    return (now(device()) - start) / repeats


def neural_style_seconds(size: int, options: argparse.Namespace) -> float:
    """Return the time of 500 steps, extrapolated from a few."""
    content, style = (torch.rand(1, 3, size, size, device=device()) for _ in range(2))
    module = NeuralStyle(backbone=options.backbone, weights=options.weights)
    module.setup_features()
    module.to(device())
    module.prepare_targets({"image": 255 * content, "style": 255 * style})
    steps = descend(module.image_losses, content)
    for step in range(WARM_UP_STEPS + options.repeats):
        if step == WARM_UP_STEPS:
            start = now(device())
        next(steps)
    return 500 * (now(device()) - start) / options.repeats


def descend(image_losses: Callable[[Tensor], dict[str, Tensor]], init: Tensor) -> Iterator[Tensor]:
    """Take steps of L-BFGS with pixels clamped to 0..1; yield the loss before each step.

    Args:
        image_losses: returns the loss terms of an image (1, 3, H, W).
        init: initial image.
    """
    image = torch.nn.Parameter(init.clone())
    optimizer = lbfgs([image])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack(list(image_losses(image).values())).sum()
        loss.backward()
        return loss.detach()

    while True:
        previous = image.detach().clone()
        loss = optimizer.step(closure)  # type: ignore[arg-type]  # the loss may be a tensor
        limit_step(optimizer, image, previous, previous.new_zeros(()), previous.new_ones(()))
        yield loss  # type: ignore[misc]


def one_pass(options: argparse.Namespace) -> int:
    """Print the table of times."""
    with tempfile.TemporaryDirectory() as folder:
        write_style_images(folder, contents=1, styles=1, size=256)
        style = str(min(Path(folder, "style").iterdir()))
        modules = {
            "FastStyle": FastStyle(weights="random"),
            "AdaIN": AdaIN(weights="random", styles=[style]),
            "StylePrediction": StylePrediction(weights="random", styles=[style]),
        }
        for module in modules.values():
            module.setup("predict")
            module.eval().to(device())
        print(
            f"ms per image, batch size 1, {device()}, {torch.get_num_threads()} threads; style images are encoded once"
        )
        columns = [f"{size} px" for size in options.sizes]
        print(f"{'':26}" + "".join(f"{column:>12}" for column in columns) + "    papers, Titan X")
        optimization = {size: neural_style_seconds(size, options) for size in options.sizes}
        seconds_by_name = {"neural style, 500 steps": optimization}
        for name, module in modules.items():
            seconds_by_name[name] = {}
            for size in options.sizes:
                image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, device=device())
                seconds_by_name[name][size] = seconds_per_image(lambda: module.predict(image), options.repeats)  # noqa: B023
    for name, seconds in seconds_by_name.items():
        paper = PAPER_SECONDS.get(name, {})
        reported = ", ".join(f"{1e3 * paper[size]:g} ({size})" for size in options.sizes if size in paper) or "none"
        print(f"{name:26}" + "".join(f"{1e3 * seconds[size]:12.1f}" for size in options.sizes) + f"    {reported}")
    for name in modules:
        for size in options.sizes:
            ratio = optimization[size] / seconds_by_name[name][size]
            print(f"ratio {ratio:.0f}: seconds, neural style, 500 steps / {name}, {size} px")
    print("Johnson et al. 2016, table 1: 1060 at 256, 1026 at 512, 1042 at 1024")
    return 0


def curve(options: argparse.Namespace) -> int:
    """Print how many steps of L-BFGS reach the loss of one pass, and draw the curves."""
    if options.fast_style is None or options.held_out is None:
        print("curve: skipped; set --fast_style CHECKPOINT and --held_out FOLDER")
        return 0
    given = {} if options.style is None else {"style": options.style}
    module, _ = load_system(options.fast_style, (FastStyle,), weights=options.weights, **given)
    module.setup("fit")
    module.to(device()).requires_grad_(False)
    make_folder("figure", os.path.dirname(options.figure) or ".")
    read = EvalTransform(options.size, options.size)
    lines: list[tuple[list[float], float, float]] = []
    steps = []
    for path in list_images(options.held_out)[: options.num_images]:
        content = read(path)[None].to(device())
        content_float = content.float() / 255
        assert module.features is not None
        with torch.no_grad():
            targets = {
                "content": module.features(content_float)[module.content_layer],
                "grams": module.style_targets({"image": content}),
            }
            stylized_loss, content_loss = (
                float(torch.stack(list(module.image_losses(x, **targets).values())).sum())
                for x in (module.stylize(content).clamp(0, 1), content_float)
            )
        noise = torch.rand(content_float.shape, generator=torch.Generator().manual_seed(0)).to(content_float.device)
        # Each loss is computed before its step, so one more step gives the last loss.
        steps_down = descend(partial(module.image_losses, **targets), noise)
        losses = torch.stack(list(islice(steps_down, options.steps + 1))).flatten().tolist()
        reached = next((step for step, loss in enumerate(losses) if loss <= stylized_loss), None)
        steps.append(reached)
        lines.append((losses, stylized_loss, content_loss))
        name = Path(path).name
        print(
            f"{name}: content image {content_loss:.4g}, one pass {stylized_loss:.4g}, "
            f"after {options.steps} steps {losses[-1]:.4g}; "
            + (f"one pass equals {reached} steps" if reached is not None else "one pass is not reached"),
            flush=True,
        )
    known = sorted(step for step in steps if step is not None)
    if known:
        print(f"one pass equals {known[len(known) // 2]} steps (median of {len(known)} images); 50 to 100 in the paper")
    draw_curves(lines, options.figure)
    print(f"curves: {options.figure}")
    return 0


def draw_curves(lines: list[tuple[list[float], float, float]], path: str) -> None:
    """Draw the mean loss over images of one pass, of the content image, and of L-BFGS by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves, stylized_loss, content_loss = (torch.tensor(values).mean(0) for values in zip(*lines, strict=True))
    axes.plot(curves.tolist(), label="L-BFGS")
    axes.axhline(float(stylized_loss), color="tab:green", label="one pass")
    axes.axhline(float(content_loss), color="tab:red", linestyle="--", label="content image")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"mean loss of {len(lines)} images")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "neural_style": neural_style,
    "one_pass": one_pass,
    "curve": curve,
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_speed", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--content", help="content image; default: a synthetic scene")
    parser.add_argument("--style", help="style image; default: a synthetic texture; for curve, the checkpoint's")
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels; default: %(default)s")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[256, 512, 1024],
        help="sides of one_pass in pixels; default: %(default)s",
    )
    parser.add_argument("--steps", type=int, default=500, help="steps of L-BFGS; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed images of one_pass; default: %(default)s")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg19", help="default: %(default)s")
    parser.add_argument("--weights", default="random", help="as --model.weights; default: %(default)s")
    parser.add_argument("--fast_style", help="checkpoint of a FastStyle, for curve")
    parser.add_argument("--held_out", help="folder of images not trained on, for curve")
    parser.add_argument("--num_images", type=int, default=5, help="number of these images; default: %(default)s")
    parser.add_argument("--figure", default="style_curve.png", help="file of the curves; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default: %(default)s")
    options = parser.parse_args(arguments)
    require_positive(options, "size", "sizes", "repeats", "num_images", "threads")
    if options.steps <= WARM_UP_STEPS:
        raise UserError(f"steps: expected more than {WARM_UP_STEPS} (the warm-up), found {options.steps}")
    if min(options.sizes) < MIN_SIZE:
        raise UserError(f"sizes: expected at least {MIN_SIZE} pixels, found {min(options.sizes)}")
    torch.set_num_threads(options.threads)
    silence_trainer()
    return max(PARTS[name](options) for name in options.parts)


if __name__ == "__main__":
    sys.exit(main())
