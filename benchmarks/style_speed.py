"""How fast pictures are painted: ``python -m benchmarks.style_speed``.

Neural style: `NeuralStyle`, run by the Trainer, against the way of PyTorch's tutorial, in which losses are modules of a
Sequential between the layers. Features, weights of the terms, start, optimiser and steps are the same, and so must the
loss be in the end, which is checked. The peers, from the slowest on:

- ``targets recomputed``: the style goes through the network before each step;
- ``tutorial``: targets are kept, and the network's weights get gradients that nobody uses, as the tutorial has it;
- ``tutorial, frozen``: without those gradients.

All take turns step by step, so that a disturbance of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.style_images import ImagePair
from datamodules.synthetic.style_images import write_style_images
from lightning_modules.components.features import Features
from lightning_modules.style.neural_style import CONTENT, STYLE, NeuralStyle

WARM_UP = 2  # steps that are not timed
APART = 0.05  # losses may differ by this share: rounding grows with the steps
PEERS = {"targets recomputed": (True, False), "tutorial": (False, False), "tutorial, frozen": (False, True)}

Mode = Literal["pass", "keep", "measure"]


class LossModule(nn.Module):
    """Gives on what it gets; ``loss`` is its distance from what it got while ``mode`` was ``keep``."""

    def __init__(self, statistic: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__()
        self.statistic, self.weight = statistic, weight
        self.mode: Mode = "pass"
        self.target = self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "keep":
            self.target = self.statistic(x).detach()
        elif self.mode == "measure":
            self.loss = self.weight * F.mse_loss(self.statistic(x), self.target)
        return x


class Normalisation(nn.Module):
    """The first layer of a `Tutorial`."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in features.normalisation)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


def gram_of_one(x: Tensor) -> Tensor:
    """The Gram matrix of one image (1,N,h,w) by the number of places, as a product of matrices."""
    flat = x.flatten(0, 1).flatten(1)
    return torch.mm(flat, flat.t()) / flat.shape[1]


class Tutorial:
    """Neural style as the tutorial writes it.

    Args:
        features: of the module that it is compared with; they are copied.
        content, style: float (1,3,H,W) in 0..1.
        start: what the image begins as.
        recompute: the style's targets before each step.
        frozen: the weights get no gradients.
    """

    def __init__(
        self, features: Features, content: Tensor, style: Tensor, start: Tensor, recompute: bool, frozen: bool
    ) -> None:
        self.style, self.recompute = style, recompute
        self.content_losses, self.style_losses = nn.ModuleList(), nn.ModuleList()
        network: list[nn.Module] = [Normalisation(features)]
        for name, layer in copy.deepcopy(features).layers.items():
            network.append(layer.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
            if name in CONTENT:
                self.content_losses.append(LossModule(lambda x: x, 1.0))
                network.append(self.content_losses[-1])
            if name in STYLE:
                maps = next(p for p in reversed(list(nn.Sequential(*network).parameters()))).shape[0]
                self.style_losses.append(LossModule(gram_of_one, 1000 / maps**2))
                network.append(self.style_losses[-1])
        self.network = nn.Sequential(*network).requires_grad_(not frozen)
        self._keep(self.content_losses, content)
        self._keep(self.style_losses, style)
        self.image = nn.Parameter(start.clone())
        self.optimizer = torch.optim.LBFGS([self.image], lr=1.0, max_iter=1, history_size=20)
        self.loss = torch.zeros(())

    def _keep(self, losses: nn.ModuleList, image: Tensor) -> None:
        everything = [module for module in self.network if isinstance(module, LossModule)]
        for module in everything:
            module.mode = "keep" if module in losses else "pass"
        with torch.no_grad():
            self.network(image)
        for module in everything:
            module.mode = "measure"

    def step(self) -> None:
        """One iteration; ``loss`` is that of the image before it."""

        def closure() -> float:
            self.optimizer.zero_grad()
            if self.recompute:
                self._keep(self.style_losses, self.style)
            self.network(self.image)
            terms = [module.loss for module in (*self.content_losses, *self.style_losses)]
            loss = torch.stack(terms).sum()
            loss.backward()
            self.loss = loss.detach()
            return loss  # type: ignore[return-value]  # as the optimiser takes it

        self.optimizer.step(closure)
        with torch.no_grad():
            self.image.clamp_(0, 1)


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


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {"neural_style": neural_style}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.style_speed", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--content", help="a photograph; default: a drawn scene")
    parser.add_argument("--style", help="a picture of style; default: a drawn texture")
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels; default: %(default)s")
    parser.add_argument("--steps", type=int, default=500, help="of neural style; default: %(default)s")
    parser.add_argument("--network", choices=("vgg16", "vgg19"), default="vgg19", help="default: %(default)s")
    parser.add_argument("--weights", default="random", help="as --model.weights; default: %(default)s")
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
