"""How fast images are painted: ``python -m benchmarks.style_speed``.

``neural_style``: `NeuralStyle`, run by the Trainer, against the way of PyTorch's tutorial, `benchmarks.style_tutorial`.
Features, weights of the terms, start, optimizer and steps are the same, and so must the loss be in the end, which is
checked. The peers, from the slowest on:

- ``targets recomputed``: the style goes through the network before each step;
- ``tutorial``: targets are kept, and the network's weights get gradients that nobody uses, as the tutorial has it;
- ``tutorial, frozen``: without those gradients.

All take turns step by step, so that a disturbance of the machine meets all of them.

``one_pass``: milliseconds an image, from uint8 pixels to uint8 pixels, of the systems that paint in one pass, beside
500 steps of neural style at the same size, and what the papers report of a Titan X.

``curve``, with ``--fast_style CHECKPOINT``: how many steps of L-BFGS from noise it takes to get below the loss of what
the network paints in one pass, on images that it has not seen (Johnson et al. 2016, figure 5).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.style_figures import NETWORKS, lbfgs
from benchmarks.style_tutorial import Tutorial
from datamodules.folders import list_images
from datamodules.style.style_images import ImagePair
from datamodules.synthetic.style_images import write_style_images
from datamodules.transforms import EvalTransform
from lightning_modules.style.adain import AdaIN
from lightning_modules.style.fast_style import FastStyle
from lightning_modules.style.learned_image import keep_in_bounds
from lightning_modules.style.neural_style import NeuralStyle
from lightning_modules.style.style_prediction import StylePrediction

WARM_UP = 2  # steps that are not timed
APART = 0.05  # losses may differ by this share: rounding grows with the steps
PEERS = {"targets recomputed": (True, False), "tutorial": (False, False), "tutorial, frozen": (False, True)}
#: Seconds an image on a Titan X at 256, 512 and 1024 pixels, as the papers have them.
PAPERS = {
    "neural style, 500 steps": {256: 15.86, 512: 54.85, 1024: 214.44},
    "FastStyle": {256: 0.015, 512: 0.05, 1024: 0.21},
    "AdaIN": {256: 0.018, 512: 0.065},
}


class TakeTurns(pl.Callback):
    """After each step of the module one of each peer; ``seconds`` has the sums, after the warm-up."""

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
            pl_module.targets(batch)  # which rescales the features
            content, style = batch["image"].float() / 255, batch["style"].float() / 255
            start = pl_module.image.detach()
            self.peers = {
                name: Tutorial(pl_module.features, content, style, start, *options) for name, options in PEERS.items()
            }
            self._since = now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # From the last peer's end: all that the Trainer does between two steps is ours.
        for name in self.seconds:
            if name != "ours":
                self.peers[name].step()
            then, self._since = self._since, now()
            if batch_idx >= WARM_UP:
                self.seconds[name] += self._since - then


def now() -> float:
    """Seconds, after all that was given to the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def neural_style(options: argparse.Namespace) -> int:
    """Prints the ratios; 1 if the losses do not agree."""
    with tempfile.TemporaryDirectory() as folder:
        content, style = options.content, options.style
        if content is None or style is None:
            write_style_images(folder, contents=1, styles=1, size=max(options.size, 16))
            content, style = content or f"{folder}/content/000.jpg", style or f"{folder}/style/stripes_00.jpg"
        turns = TakeTurns()
        trainer = pl.Trainer(
            max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder, callbacks=[turns],
        )  # fmt: skip
        module = NeuralStyle(network=options.network, weights=options.weights)
        trainer.fit(module, datamodule=ImagePair(content, style, options.size, steps=options.steps))
    losses = {"ours": float(trainer.callback_metrics["train/loss"])}
    losses |= {name: float(peer.loss) for name, peer in turns.peers.items()}
    counted = options.steps - WARM_UP
    assert module.image is not None
    height, width = module.image.shape[-2:]
    print(
        f"neural style, {width}x{height}, {options.network}, weights {options.weights}, {options.steps} steps on "
        f"{module.image.device.type}"
    )
    for name, seconds in turns.seconds.items():
        print(f"  {name:20s} {1e3 * seconds / counted:8.1f} ms a step, loss {losses[name]:.5g}")
    for name in PEERS:
        print(f"ratio {turns.seconds[name] / turns.seconds['ours']:.2f}: {name}, against ours")
    apart = max(abs(loss / losses["ours"] - 1) for loss in losses.values())
    print(f"losses {100 * apart:.2g} % apart at most")
    if not apart <= APART:
        print("the losses do not agree")
        return 1
    return 0


@torch.no_grad()
def seconds_a_picture(predict: Callable[[], Any], repeats: int) -> float:
    """Mean of ``repeats`` after one that is not counted."""
    predict()
    start = now()
    for _ in range(repeats):
        predict()
    return (now() - start) / repeats


def neural_style_seconds(size: int, options: argparse.Namespace) -> float:
    """Of 500 steps, reckoned from a few: each takes as long as any other."""
    content, style = (torch.rand(1, 3, size, size, device=device()) for _ in range(2))
    module = NeuralStyle(network=options.network, weights=options.weights).to(device())
    module.setup_features()
    module.targets({"image": 255 * content, "style": 255 * style})
    steps = descend(module.distances, content)
    for step in range(WARM_UP + options.repeats):
        if step == WARM_UP:
            start = now()
        next(steps)
    return 500 * (now() - start) / options.repeats


def descend(distances: Callable[[Tensor], dict[str, Tensor]], start: Tensor) -> Iterator[Tensor]:
    """Steps of L-BFGS, pixels kept within 0..1, as long as they are asked for; gives the loss before each.

    Args:
        distances: named terms of the loss of an image (1,3,H,W).
        start: what it begins as.
    """
    image = torch.nn.Parameter(start.clone())
    optimizer = lbfgs([image])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack(list(distances(image).values())).sum()
        loss.backward()
        return loss.detach()

    while True:
        before = image.detach().clone()
        loss = optimizer.step(closure)  # type: ignore[arg-type]  # the loss may be a tensor
        keep_in_bounds(optimizer, image, before, before.new_zeros(()), before.new_ones(()))
        yield loss  # type: ignore[misc]


def one_pass(options: argparse.Namespace) -> int:
    """Prints the table of times."""
    with tempfile.TemporaryDirectory() as folder:
        write_style_images(folder, contents=1, styles=1, size=256)
        style = str(min(Path(folder, "style").iterdir()))
        painters = {
            "FastStyle": FastStyle(weights="random"),
            "AdaIN": AdaIN(weights="random", styles=[style]),
            "StylePrediction": StylePrediction(weights="random", styles=[style]),
        }
        for module in painters.values():
            module.setup("predict")
            module.eval().to(device())
        print(f"ms an image, one at a time, {device()}, {torch.get_num_threads()} threads; the style is read once")
        columns = [f"{size} px" for size in options.sizes]
        print(f"{'':26}" + "".join(f"{column:>12}" for column in columns) + "    papers, Titan X")
        slow = {size: neural_style_seconds(size, options) for size in options.sizes}
        found = {"neural style, 500 steps": slow}
        for name, module in painters.items():
            found[name] = {}
            for size in options.sizes:
                image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, device=device())
                found[name][size] = seconds_a_picture(lambda: module.predict(image), options.repeats)  # noqa: B023
    for name, seconds in found.items():
        paper = PAPERS.get(name, {})
        told = ", ".join(f"{1e3 * paper[size]:g} ({size})" for size in options.sizes if size in paper) or "none"
        print(f"{name:26}" + "".join(f"{1e3 * seconds[size]:12.1f}" for size in options.sizes) + f"    {told}")
    for name in painters:
        ratios = ", ".join(f"{slow[size] / found[name][size]:.0f} at {size}" for size in options.sizes)
        print(f"ratio of neural style's 500 steps to {name}: {ratios}")
    print("Johnson et al. 2016, table 1: 1060 at 256, 1026 at 512, 1042 at 1024")
    return 0


def curve(options: argparse.Namespace) -> int:
    """Prints how many steps of L-BFGS are as good as one pass, and draws the curves."""
    if options.fast_style is None or options.held_out is None:
        print("curve: left out: it needs --fast_style CHECKPOINT and --held_out FOLDER, of images not trained on")
        return 0
    given = {} if options.style is None else {"style": options.style}
    module = FastStyle.load_from_checkpoint(options.fast_style, weights=options.weights, map_location="cpu", **given)
    module.setup("fit")
    module.eval().to(device()).requires_grad_(False)
    read = EvalTransform(options.size, options.size)
    lines: list[tuple[list[float], float, float]] = []
    steps = []
    for path in list_images(options.held_out)[: options.pictures]:
        content = read(path)[None].to(device())
        plain = content.float() / 255
        with torch.no_grad():
            one, unchanged = (
                float(sum(module.distances(x, plain).values())) for x in (module.paint(content).clamp(0, 1), plain)
            )
        noise = torch.rand(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain.device)
        # The loss before one step more is that after the last.
        steps_down = descend(partial(module.distances, content=plain), noise)
        losses = torch.stack(list(islice(steps_down, options.steps + 1))).flatten().tolist()
        reached = next((step for step, loss in enumerate(losses) if loss <= one), None)
        steps.append(reached)
        lines.append((losses, one, unchanged))
        name = Path(path).name
        print(
            f"{name}: as it is {unchanged:.4g}, one pass {one:.4g}, after {options.steps} steps {losses[-1]:.4g}; "
            + (f"{reached} steps are as good" if reached is not None else "no number of these steps is as good"),
            flush=True,
        )
    known = sorted(step for step in steps if step is not None)
    if known:
        print(f"as good as one pass: {known[len(known) // 2]} steps (median of {len(known)}), in the paper 50 to 100")
    draw_curves(lines, options.picture)
    print(f"curves: {options.picture}")
    return 0


def draw_curves(lines: list[tuple[list[float], float, float]], path: str) -> None:
    """The mean over the images of each kind: one pass, the image as it is, L-BFGS step by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves, one, unchanged = (torch.tensor(values).mean(0) for values in zip(*lines, strict=True))
    axes.plot(curves.tolist(), label="L-BFGS")
    axes.axhline(float(one), color="tab:green", label="one pass")
    axes.axhline(float(unchanged), color="tab:red", linestyle="--", label="the image as it is")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"the same loss, mean of {len(lines)} images")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "neural_style": neural_style,
    "one_pass": one_pass,
    "curve": curve,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_speed", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--content", help="a photograph; default: a drawn scene")
    parser.add_argument("--style", help="an image of style; default: a drawn texture, in curve the checkpoint's")
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels; default: %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="of one_pass")
    parser.add_argument("--steps", type=int, default=500, help="of L-BFGS; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed images of one_pass; default: %(default)s")
    parser.add_argument("--network", choices=NETWORKS, default="vgg19", help="default: %(default)s")
    parser.add_argument("--weights", default="random", help="as --model.weights; default: %(default)s")
    parser.add_argument("--fast_style", help="checkpoint of a FastStyle, for curve")
    parser.add_argument("--held_out", help="folder of images that it has not seen, for curve")
    parser.add_argument("--pictures", type=int, default=5, help="how many of them; default: %(default)s")
    parser.add_argument("--picture", default="style_curve.png", help="where the curves go; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP:
        parser.error(f"--steps: expected more than {WARM_UP}, which warm up, found {options.steps}")
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    try:
        return max(PARTS[name](options) for name in options.parts)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"style_speed: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
