"""Base classes of style: images that are optimized, and style-transfer networks with a perceptual loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from errors import UserError
from lightning_modules.base import IMAGENET_MEAN, OptimizerFactory, ScheduleFactory, VisionModule
from lightning_modules.components.features import RANDOM, FeatureBackbone, Features
from lightning_modules.components.image_batches import require_equal_size
from lightning_modules.components.unsaved import FrozenNetwork
from lightning_modules.style.image_optimization import estimate_memory, free_memory, limit_step
from lightning_modules.style.losses import divide_by_mean_square, feature_distance, gram_style_loss, total_variation
from lightning_modules.style.stylization import (
    require_non_negative,
    stylization_metrics,
    stylized_prediction,
    to_uint8,
    update_stylization_metrics,
)

NOISE_STD = 0.27  # standard deviation of the pixels of natural images about ImageNet's mean, in 0..1
NOISE_SEED = 1
MAX_MEMORY_FRACTION = 0.8  # of the free memory

Init = Literal["noise", "content"]

# --- optimized images -------------------------------------------------------------------------------------------------


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
            sample = data.dataset("train")[0]
            content = sample["image"]
            self._check_memory(content)
            if "style" in sample:
                self._required_memory("style", sample["style"])
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
        height, width = content.shape[-2:]
        name = type(self).__name__
        required = self._required_memory("image_size", content)
        # Lightning moves the module after setup, so self.device is still the CPU.
        free = free_memory(self.trainer.strategy.root_device)
        if free is not None and required > MAX_MEMORY_FRACTION * free:
            side = int(max(height, width) * (MAX_MEMORY_FRACTION * free / required) ** 0.5)
            raise UserError(
                f"image_size: expected an image that fits into {free / 2**30:.1f} GiB of free memory, found "
                f"{width}x{height} pixels, which need about {required / 2**30:.1f} GiB; set --data.image_size {side}"
            )
        rank_zero_only(print)(f"{name}: {width}x{height} pixels, about {required / 2**30:.1f} GiB", flush=True)

    def _required_memory(self, option: str, image: Tensor) -> int:
        """Return the bytes that an image (3, H, W) needs; raise a UserError if it is too small for the features."""
        assert self.features is not None
        height, width = image.shape[-2:]
        try:
            return estimate_memory(self.features.network, height, width)
        except RuntimeError:
            raise UserError(
                f"{option}: expected an image large enough for {self.feature_layers[-1]}, found {width}x{height}; "
                "use a larger image or an earlier layer"
            ) from None

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


# --- networks with a perceptual loss ----------------------------------------------------------------------------------


class PerceptualStyleTransfer(VisionModule):
    """Base class of the style-transfer networks that are trained with a perceptual loss (Johnson et al. 2016).

    A subclass implements ``style_targets(batch)`` and ``stylize_batch(batch)``. Loss: ``content``, `feature_distance`;
    ``style``, `gram_style_loss`; ``tv``, the total variation per pixel value. Metrics: the terms, ``val/loss``, and
    ``val/style_ratio``, the style loss relative to that of the content images. The loss network is used in training and
    evaluation only and is not in checkpoints.

    Args:
        content_layer: layer of the content loss: relu2_2 in the paper, relu3_3 in the authors' released models.
        style_layers: layers of the style loss.
        content_weight: weight of the content loss, as in the authors' code; other features need other weights.
        style_weight: weight of the style loss, as in the authors' code.
        tv_weight: weight of the total variation per pixel value, for pixels in 0..1.
        normalize_distances: divide the distance of each layer by the mean square of its target, so that the weights do
            not depend on the scale of the features; recommended for random ones.
        backbone: loss network, see `Features`.
        weights: weights of the loss network, see `Features`.
        kwargs: see `VisionModule`.

    Raises:
        UserError: a weight is negative.
    """

    monitor = ("val/loss", "min")
    #: Pooling of the loss network.
    pooling: Literal["max", "average"] = "max"
    #: Constant factor of the total variation.
    tv_factor = 1.0

    def __init__(
        self,
        content_layer: str = "relu2_2",
        style_layers: Sequence[str] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),
        content_weight: float = 1.0,
        style_weight: float = 5.0,
        tv_weight: float = 0.0,
        normalize_distances: bool = False,
        backbone: FeatureBackbone = "vgg16",
        weights: str = "DEFAULT",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_non_negative(content_weight=content_weight, style_weight=style_weight, tv_weight=tv_weight)
        self.content_layer, self.style_layers = content_layer, list(style_layers)
        self.content_weight, self.style_weight, self.tv_weight = content_weight, style_weight, tv_weight
        self.normalize_distances, self.backbone, self.weights = normalize_distances, backbone, weights
        self.features: FrozenNetwork | None = None

    def style_targets(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the Gram matrices of the style by layer, float32 (B, C, C) or (1, C, C)."""
        raise NotImplementedError

    def stylize_batch(self, batch: dict[str, Any]) -> Tensor:
        """Return the stylized images of a batch, float32 (B, 3, H, W) in about 0..1."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict" and self.features is None:
            layers = list(dict.fromkeys([self.content_layer, *self.style_layers]))
            features = FrozenNetwork(Features(layers, self.backbone, self.weights, self.pooling))
            self.features = features.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            grams = self.style_targets(batch)
            content = self._content_features(batch)[self.content_layer]
        return {
            name: term.mean() for name, term in self.image_losses(self.stylize_batch(batch), content, grams).items()
        }

    def image_losses(self, stylized: Tensor, content: Tensor, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss terms of each image.

        Args:
            stylized: stylized images, float (B, 3, H, W) in 0..1.
            content: features of the content images in ``content_layer``.
            grams: Gram matrices of the style by layer, float32 (B, C, C) or (1, C, C).

        Returns:
            float32 (B,) by name.
        """
        assert self.features is not None
        features = self.features(stylized)
        distance = feature_distance(features[self.content_layer], content)
        if self.normalize_distances:
            distance = divide_by_mean_square(distance, content)
        style = gram_style_loss(features, grams, self.normalize_distances)
        terms = {"content": self.content_weight * distance, "style": self.style_weight * style}
        if self.tv_weight:
            terms["tv"] = self.tv_factor * self.tv_weight * total_variation(stylized) / stylized[0].numel()
        return terms

    def build_metrics(self) -> MetricCollection:
        return stylization_metrics("content", "style", *(["tv"] if self.tv_weight else []))

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        grams, content = self.style_targets(batch), self._content_features(batch)
        terms = self.image_losses(predictions["stylized"].float() / 255, content[self.content_layer], grams)
        content_style_loss = self.style_weight * gram_style_loss(content, grams, self.normalize_distances)
        update_stylization_metrics(metrics, terms, content_style_loss)

    def _content_features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        assert self.features is not None
        return self.features(require_equal_size(batch["image"]).float() / 255)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the name of the loss network's weights, which are not in the checkpoint."""
