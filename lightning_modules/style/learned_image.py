"""What the systems that learn an image share: the image, its one parameter, and the features that it is compared by."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, OptimizerFactory, VisionModule
from lightning_modules.components.features import FeatureBackbone, Features
from lightning_modules.style.painting import to_pixels

NOISE = 0.27  # deviation of natural images' pixels about ImageNet's mean, on 0..1
SEED = 1  # of the noise that an image begins with
SHARE = 0.8  # of the free memory that a run may take
LONGEST = 0.25  # on 0..1: what a pixel moves in a step of L-BFGS at most

Start = Literal["noise", "content"]


class LearnedImage(VisionModule):
    """Base: the parameter ``image`` float32 (1,3,H,W), RGB in 0..1, as large as the content.

    A subclass says what is compared: ``make_targets(batch)``, called once, and ``distances(image)``, the named terms of
    the loss. Batch: ``image``, the content, and ``style``, uint8 (1,3,H,W), always the same pair (`ImagePair`).
    Prediction: ``stylized`` uint8 (1,3,H,W), the image, and ``random`` bool (1,), whether its features were random.
    Metrics: ``val/loss`` and its terms, at the image as it is drawn.

    The features are no part of a checkpoint: whoever goes on with it needs the same weights.

    Args:
        layers: of the features, see `Features`.
        network, weights, pooling: see `Features`.
        rescaled: filters with a mean activation of 1 on the style, or else the content, see `Features.rescale`. Random
            ones stay as they are: they are of one scale already.
        start: what the image begins as.
        bounded: keep it within 0..1, or what a subclass says, after each step.
        optimizer: L-BFGS with one iteration a step, for which torch's own count is 20; or any other.
        channels_last: of the features' weights.
        kwargs: schedule of `VisionModule`.
    """

    monitor = ("val/loss", "min")
    #: Its predictions are the frames of a film.
    film = True

    def __init__(
        self,
        layers: Sequence[str],
        network: FeatureBackbone,
        weights: str,
        pooling: Literal["max", "average"],
        rescaled: bool,
        start: Start,
        bounded: bool,
        optimizer: OptimizerFactory,
        channels_last: bool = True,
        **kwargs: Any,
    ) -> None:
        # L-BFGS views gradients as vectors, so that the image itself stays in NCHW memory.
        super().__init__(optimizer=optimizer, channels_last=False, **kwargs)
        self.feature_format = torch.channels_last if channels_last else torch.contiguous_format
        self.feature_options = {"layers": list(layers), "backbone": network, "weights": weights, "pooling": pooling}
        self.rescaled, self.start, self.bounded = rescaled, start, bounded
        self.image: nn.Parameter | None = None
        # In a list, since a submodule would be saved.
        self._features: list[Features] = []
        self._targets: dict[str, Tensor] = {}

    # --- what a system writes -----------------------------------------------------------------------------------------

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the image is compared with. ``batch`` has float images (1,3,H,W) in 0..1."""
        raise NotImplementedError

    def distances(self, image: Tensor) -> dict[str, Tensor]:
        """Named terms of the loss of an image (1,3,H,W) in 0..1; see `targets`."""
        raise NotImplementedError

    def bounds(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """Between what pixels are kept. ``content`` is float (1,3,H,W) in 0..1."""
        return content.new_zeros(()), content.new_ones(())

    # --- the image ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "predict":
            self.setup_features()
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            if data is None:
                raise UserError(f"{type(self).__name__}: the image comes from a datamodule: give one (ImagePair)")
            sample = data.dataset("train")[0]
            self._check_memory(sample["image"])
            if self.image is None:
                self.image = nn.Parameter(self._begin(sample["image"][None].float() / 255))
        super().setup(stage)

    def setup_features(self) -> None:
        """Makes the features, once: they are needed to learn and to measure, not to predict."""
        if not self._features:
            self._features = [Features(**self.feature_options)]  # type: ignore[arg-type]
            self._features[0].to(memory_format=self.feature_format)  # type: ignore[call-overload]

    def _begin(self, content: Tensor) -> Tensor:
        if self.start == "content":
            return content.clone()
        noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(SEED))
        return (torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) + NOISE * noise).clamp(0, 1)

    @property
    def features(self) -> Features:
        return self._features[0].to(self.device)

    def _check_memory(self, content: Tensor) -> None:
        """Says what the run will take, and refuses one that cannot be."""
        height, width = content.shape[-2:]
        name = type(self).__name__
        try:
            needed = memory_of(self._features[0], height, width)
        except RuntimeError:
            raise UserError(
                f"{name}: of {width}x{height} pixels nothing is left in {self.feature_options['layers'][-1]}: "
                "take a larger image, or an earlier layer"
            ) from None
        free = free_memory(self.device)
        if free is not None and needed > SHARE * free:
            side = int(max(height, width) * (SHARE * free / needed) ** 0.5)
            raise UserError(
                f"{name}: {width}x{height} pixels need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: "
                f"--data.image_size {side}"
            )
        rank_zero_only(print)(f"{name}: {width}x{height} pixels, about {needed / 2**30:.1f} GiB", flush=True)

    def targets(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`make_targets`, once a run."""
        if not self._targets:
            pictures: dict[str, Tensor] = {k: batch[k].float() / 255 for k in ("image", "style") if k in batch}
            with torch.no_grad():
                if self.rescaled and not self.features.random:
                    self.features.rescale_filters(pictures.get("style", pictures["image"]))
                self._low, self._high = self.bounds(pictures["image"])
                self._targets = self.make_targets(pictures)
        return self._targets

    # --- steps --------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.targets(batch)
        assert self.image is not None
        return self.distances(self.image)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        assert self.image is not None
        before = self.image.detach().clone()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here, since a checkpoint is written before the module's own end of a step.
        inner = getattr(optimizer, "optimizer", optimizer)
        keep_in_bounds(inner, self.image, before, *((self._low, self._high) if self.bounded else (None, None)))

    def predict_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.predict(batch["image"])

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """The image, whatever is given."""
        if self.image is None:
            raise UserError(f"{type(self).__name__}: no image was learned: --ckpt_path CHECKPOINT")
        pixels = to_pixels(self.image.detach())
        return {"stylized": pixels, "random": torch.tensor([self.feature_options["weights"] == "random"])}

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({}, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        self.targets(batch)
        image = predictions["stylized"].to(self.device).float() / 255
        values = {name: term.detach() for name, term in self.distances(image).items()}
        values["loss"] = torch.stack(list(values.values())).sum()
        for name, value in {**values, **self.measures(image, batch)}.items():
            if name not in metrics:
                metrics.add_metrics({name: MeanMetric().to(self.device)})
            metrics[name].update(value)

    def measures(self, image: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Further metrics of the image (1,3,H,W) in 0..1."""
        return {}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the name of the weights: they are not in the checkpoint."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.image is None:
            self.image = nn.Parameter(torch.zeros_like(checkpoint["state_dict"]["image"]))


@torch.no_grad()
def keep_in_bounds(
    optimizer: torch.optim.Optimizer, image: Tensor, before: Tensor, low: Tensor | None, high: Tensor | None
) -> None:
    """Brings an image back between its bounds after a step, and keeps L-BFGS from running away.

    L-BFGS without a line search takes the step that its image of the curvature suggests, which early on may be a
    hundred times too long and ends with every pixel at a bound. So that no pixel moves by more than `LONGEST` a step
    is shortened. What it learns the curvature from is the step that was made and not the one that it wanted.

    Args:
        optimizer: that made the step.
        image: float (1,3,H,W), changed in place.
        before: what it was.
        low, high: float, as `torch.clamp` takes them; None: there are no bounds.
    """
    newton = isinstance(optimizer, torch.optim.LBFGS)
    if newton:
        step = image - before
        image.copy_(before + step * (LONGEST / step.abs().max().clamp(min=LONGEST)))
    if low is not None:
        image.clamp_(low, high)
    if newton:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        if "d" in state:
            state["d"] = (image - before).flatten() / state["t"]


def memory_of(features: Features, height: int, width: int) -> int:
    """Bytes that a step takes: all activations, their gradients, and the weights.

    Raises:
        RuntimeError: the image is too small for the layers.
    """
    counted: list[int] = []
    empty = copy.deepcopy(features).to("meta")
    hooks = [
        layer.register_forward_hook(lambda _, __, output: counted.append(output.numel()))
        for layer in empty.layers.values()
    ]
    with torch.no_grad():
        empty(torch.empty(1, 3, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return 4 * (2 * sum(counted) + sum(p.numel() for p in features.parameters()))


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
