"""Base class of the systems that optimize the pixels of an image: feature inversion, textures, neural style."""

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
from lightning_modules.base import IMAGENET_MEAN, OptimizerFactory, ScheduleFactory, VisionModule
from lightning_modules.components.features import RANDOM, FeatureBackbone, Features
from lightning_modules.components.unsaved import FrozenNetwork
from lightning_modules.style.stylization import stylized_prediction, to_uint8

NOISE_STD = 0.27  # standard deviation of the pixels of natural images about ImageNet's mean, in 0..1
NOISE_SEED = 1
MAX_MEMORY_FRACTION = 0.8  # of the free memory
MAX_PIXEL_STEP = 0.25  # largest change of a pixel in 0..1 per step of L-BFGS

Init = Literal["noise", "content"]


class OptimizedImage(VisionModule):
    """Optimize an image, the parameter ``image`` float32 (1, 3, H, W), RGB in 0..1, of the content image's size.

    A subclass implements ``make_targets(batch)``, which is called once, and ``image_losses(image)``. Batch: ``image``,
    the content image, and ``style``, uint8 (1, 3, H, W); all batches are the same (`ImagePair`). Prediction:
    ``stylized`` uint8 (1, 3, H, W), the optimized image, and ``random`` bool (1,), whether its features have random
    weights. Metrics: ``val/loss`` and its terms, for the image rounded to uint8.

    The feature extractor is not in checkpoints; resuming needs the same weights.

    Args:
        layers: layers of the losses, see `Features`.
        backbone: feature extractor, see `Features`.
        weights: weights of the feature extractor, see `Features`.
        pooling: ``average`` replaces max pooling.
        rescale_filters: rescale filters to a mean activation of 1 on the style image, or else on the content image, see
            `Features.rescale_filters`. Random weights are never rescaled.
        init: initial image.
        clamp_pixels: clamp the pixels after each step.
        optimizer: the default is L-BFGS with one iteration per step; any other optimizer can be used.
        schedule: see `VisionModule`.
        channels_last: keep the weights of the feature extractor in NHWC memory.
    """

    monitor = ("val/loss", "min")
    #: The predictions of successive validations are the frames of a film.
    film = True

    def __init__(
        self,
        layers: Sequence[str],
        backbone: FeatureBackbone = "vgg19",
        weights: str = "DEFAULT",
        pooling: Literal["max", "average"] = "average",
        rescale_filters: bool = True,
        init: Init = "noise",
        clamp_pixels: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.LBFGS(params, lr=1.0, max_iter=1, history_size=20),
        schedule: ScheduleFactory | None = None,
        channels_last: bool = True,
    ) -> None:
        # The image stays in NCHW memory: L-BFGS views gradients as vectors.
        super().__init__(optimizer=optimizer, schedule=schedule, channels_last=False)
        self.feature_format = torch.channels_last if channels_last else torch.contiguous_format
        self.feature_layers, self.backbone, self.weights, self.pooling = list(layers), backbone, weights, pooling
        self.rescale_filters, self.init, self.clamp_pixels = rescale_filters, init, clamp_pixels
        self.image: nn.Parameter | None = None
        self.features: FrozenNetwork | None = None
        self._targets: dict[str, Tensor] = {}

    # --- what a system implements -------------------------------------------------------------------------------------

    def make_targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets of the losses; ``batch`` has float images (1, 3, H, W) in 0..1."""
        raise NotImplementedError

    def image_losses(self, image: Tensor) -> dict[str, Tensor]:
        """Return the loss terms of an image (1, 3, H, W) in 0..1, scalars by name."""
        raise NotImplementedError

    def pixel_range(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range that pixels are clamped to; ``content`` is float (1, 3, H, W) in 0..1."""
        return content.new_zeros(()), content.new_ones(())

    def image_metrics(self, image: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return additional metrics of the image (1, 3, H, W) in 0..1."""
        return {}

    # --- setup --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict":
            self.setup_features()
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            if data is None:
                raise UserError(f"{type(self).__name__}: expected a datamodule, found none; set --data ImagePair")
            content = data.dataset("train")[0]["image"]
            self._check_memory(content)
            if self.image is None:
                self.image = nn.Parameter(self._initial_image(content[None].float() / 255))

    def setup_features(self) -> None:
        """Build the feature extractor once; it is used in training and evaluation, not in prediction."""
        if self.features is None:
            extractor = Features(self.feature_layers, self.backbone, self.weights, self.pooling)
            self.features = FrozenNetwork(extractor).to(self.device)
        # VisionModule.setup has applied the image's memory format to all networks.
        self.features.to(memory_format=self.feature_format)  # type: ignore[call-overload]

    def _initial_image(self, content: Tensor) -> Tensor:
        if self.init == "content":
            return content.clone()
        noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        return (torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) + NOISE_STD * noise).clamp(0, 1)

    def _check_memory(self, content: Tensor) -> None:
        """Print the memory that the run needs; raise a UserError if it exceeds the free memory."""
        assert self.features is not None
        height, width = content.shape[-2:]
        name = type(self).__name__
        try:
            required = estimate_memory(self.features.network, height, width)
        except RuntimeError:
            raise UserError(
                f"image_size: expected an image large enough for {self.feature_layers[-1]}, found {width}x{height}; "
                "use a larger image or an earlier layer"
            ) from None
        free = free_memory(self.device)
        if free is not None and required > MAX_MEMORY_FRACTION * free:
            side = int(max(height, width) * (MAX_MEMORY_FRACTION * free / required) ** 0.5)
            raise UserError(
                f"image_size: expected an image that fits into {free / 2**30:.1f} GiB of free memory, found "
                f"{width}x{height} pixels, which need about {required / 2**30:.1f} GiB; set --data.image_size {side}"
            )
        rank_zero_only(print)(f"{name}: {width}x{height} pixels, about {required / 2**30:.1f} GiB", flush=True)

    def prepare_targets(self, batch: dict[str, Any]) -> None:
        """Rescale the filters and make the targets in the first step."""
        if self._targets:
            return
        assert self.features is not None
        images: dict[str, Tensor] = {k: batch[k].float() / 255 for k in ("image", "style") if k in batch}
        with torch.no_grad():
            extractor = self.features.network
            assert isinstance(extractor, Features)
            if self.rescale_filters and not extractor.random:
                extractor.rescale_filters(images.get("style", images["image"]))
            self._low, self._high = self.pixel_range(images["image"])
            self._targets = self.make_targets(images)

    # --- steps --------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.prepare_targets(batch)
        assert self.image is not None
        return self.image_losses(self.image)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        assert self.image is not None
        previous = self.image.detach().clone()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Not in on_train_batch_end: the checkpoint callback may run before it.
        inner = getattr(optimizer, "optimizer", optimizer)
        limit_step(inner, self.image, previous, *((self._low, self._high) if self.clamp_pixels else (None, None)))

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Return the optimized image; ``images`` is not used."""
        if self.image is None:
            raise UserError(
                "ckpt_path: expected the checkpoint of an optimized image, found none; set --ckpt_path FILE"
            )
        return stylized_prediction(to_uint8(self.image.detach()), self.weights == RANDOM)

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({}, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        self.prepare_targets(batch)
        image = predictions["stylized"].to(self.device).float() / 255
        values = {name: term.detach() for name, term in self.image_losses(image).items()}
        values["loss"] = torch.stack(list(values.values())).sum()
        for name, value in {**values, **self.image_metrics(image, batch)}.items():
            if name not in metrics:
                metrics.add_metrics({name: MeanMetric().to(self.device)})
            metrics[name].update(value)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the name of the feature extractor's weights, which are not in the checkpoint."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.image is None:
            self.image = nn.Parameter(torch.zeros_like(checkpoint["state_dict"]["image"]))


@torch.no_grad()
def limit_step(
    optimizer: torch.optim.Optimizer, image: Tensor, previous: Tensor, low: Tensor | None, high: Tensor | None
) -> None:
    """Limit a step of L-BFGS and clamp the pixels, both in place.

    L-BFGS without a line search can take steps that are a hundred times too long while its estimate of the curvature is
    poor; then all pixels end at the bounds. The step is therefore scaled so that no pixel changes by more than
    `MAX_PIXEL_STEP`. The optimizer's state is set to the actual step, from which it estimates the curvature.

    Args:
        optimizer: optimizer that took the step; steps of other optimizers are not scaled.
        image: image after the step, float (1, 3, H, W).
        previous: image before the step.
        low: lower bound of the pixels; None does not clamp.
        high: upper bound of the pixels; None does not clamp.
    """
    is_lbfgs = isinstance(optimizer, torch.optim.LBFGS)
    if is_lbfgs:
        step = image - previous
        image.copy_(previous + step * (MAX_PIXEL_STEP / step.abs().max().clamp(min=MAX_PIXEL_STEP)))
    if low is not None:
        image.clamp_(low, high)
    if is_lbfgs:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        if "d" in state:
            state["d"] = (image - previous).flatten() / state["t"]


def estimate_memory(features: nn.Module, height: int, width: int) -> int:
    """Return the bytes of activations, their gradients and weights for one image of height x width pixels.

    Raises:
        RuntimeError: the image is too small for the layers.
    """
    sizes: list[int] = []
    meta = copy.deepcopy(features).to("meta")
    hooks = [
        layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
        for layer in meta.layers.values()  # type: ignore[operator,union-attr]
    ]
    with torch.no_grad():
        meta(torch.empty(1, 3, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return 4 * (2 * sum(sizes) + sum(p.numel() for p in features.parameters()))


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of the device, or None if they are unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
