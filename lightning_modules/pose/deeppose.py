"""DeepPose: a cascade of networks that regress joint coordinates.

Toshev and Szegedy, "DeepPose: Human Pose Estimation via Deep Neural Networks", CVPR 2014.

The first stage regresses all joints from the whole image. Each later stage refines every joint from a crop around its
current estimate. The notation of the shapes is:

    B people (one image each), K joints, S stages, n crops per person, c pixels per side of a crop
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, ScheduleFactory
from lightning_modules.components.alexnet import LocalResponseNorm
from lightning_modules.components.initialization import he_normal
from lightning_modules.components.networks import AUX_HEADS
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.unsaved import Constant
from lightning_modules.components.vgg import conv_relu
from lightning_modules.pose.joints import MPII_JOINTS
from lightning_modules.pose.metrics import PCK, PCP, TORSO, PCKh, apply_affine, choose_metric, pose_metrics
from lightning_modules.stages import StagedModule

ALEXNET = "alexnet_2014"  # the paper's network
MIN_TORSO = 0.1  # shorter torsos count as this fraction of the image's longer side; most are about a quarter of it

# --- network ----------------------------------------------------------------------------------------------------------


class AlexNetTrunk(nn.Sequential):
    """AlexNet of section 3.1 without its last layer: (B, 3, S, S) to (B, 4096).

    An input of 220 px gives feature maps of 55, 27, 13 and 6 px.

    Args:
        input_size: S, in pixels; it determines the size of the first fully connected layer.
        width_multiplier: factor on all channels and units.
        dropout: dropout rate after each of the two fully connected layers.
        batch_norm: batch normalization after each convolution instead of local response normalization.

    Raises:
        UserError: the input is too small.
    """

    def __init__(
        self, input_size: int = 220, width_multiplier: float = 1.0, dropout: float = 0.6, batch_norm: bool = False
    ) -> None:
        side = (input_size + 8 - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        if side < 1:
            raise UserError(f"input_size: expected 59 pixels or more for {ALEXNET}, found {input_size}")
        layers: list[nn.Module] = []
        channels = 3
        for out, kernel, stride, padding, normalize, pool in (
            (96, 11, 4, 4, True, True),
            (256, 5, 1, 2, True, True),
            (384, 3, 1, 1, False, False),
            (384, 3, 1, 1, False, False),
            (256, 3, 1, 1, False, True),
        ):
            out = max(1, round(out * width_multiplier))
            layers += conv_relu(channels, out, kernel, batch_norm, stride, padding)
            layers += [LocalResponseNorm()] if normalize and not batch_norm else []
            layers += [nn.MaxPool2d(3, 2)] if pool else []
            channels = out
        self.out_features = max(1, round(4096 * width_multiplier))
        layers.append(nn.Flatten())
        for features in (channels * side**2, self.out_features):
            layers += [nn.Linear(features, self.out_features), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        super().__init__(*layers)
        he_normal(self)


def torchvision_trunk(backbone: str, weights: str | None) -> tuple[nn.Module, int]:
    """Return a torchvision classification network without its last layer, and its number of output features.

    Raises:
        UserError: the network does not exist, or its last layer is not linear.
    """
    if backbone not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"backbone: expected {ALEXNET} or a torchvision classification network, found {backbone}")
    options: dict[str, Any] = {}
    if backbone in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False, "transform_input": False}
    network = torchvision.models.get_model(backbone, weights=None, **options)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"backbone: expected a network that ends in a linear layer, found {backbone}")
    head = linear[-1]
    features = network.get_submodule(head).in_features
    if weights is not None:
        # Of VGG and AlexNet, files without fc6 and fc7 are accepted, too.
        load_weights(network, find_weights(backbone, weights), backbone, head.split(".")[0], *AUX_HEADS)
    network.set_submodule(head, nn.Identity())
    return network, int(features)  # type: ignore[arg-type]


class PoseRegressor(nn.Module):
    """Regress K joints from normalized crops: (B, 3, S, S) to float32 (B, K, 2), see `encode`.

    The paper's network has 58,396,060 parameters with 14 joints and 58,412,448 with 16. (The paper states 40 million,
    which contradicts its layers.)

    Args:
        joints: number of joints, K.
        backbone: ``alexnet_2014`` (the paper's) or a torchvision classification network.
        weights: torchvision's weights, see `find_weights`; None trains from scratch.
        **options: see `AlexNetTrunk`; a torchvision network does not use them.
    """

    def __init__(self, joints: int = 16, backbone: str = ALEXNET, weights: str | None = None, **options: Any) -> None:
        super().__init__()
        self.trunk: nn.Module
        if backbone == ALEXNET:
            self.trunk = AlexNetTrunk(**options)
            features = self.trunk.out_features
        else:
            self.trunk, features = torchvision_trunk(backbone, weights)
        self.joints = nn.Linear(features, 2 * joints)
        # Initial predictions are close to the center of the crop, so that a new stage moves joints only a little.
        nn.init.normal_(self.joints.weight, std=1e-3)
        nn.init.zeros_(self.joints.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        # Use float32: bfloat16 rounds coordinates to a pixel of the crop.
        with torch.autocast(features.device.type, enabled=False):
            return self.joints(features.float()).unflatten(1, (-1, 2))


# --- target encoding --------------------------------------------------------------------------------------------------


def encode(keypoints: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """Normalize keypoints by a box, N(y; b) of equation 2: 0 is its center, -0.5 and 0.5 are its edges.

    Args:
        keypoints: float (..., 2), x and y in pixels.
        center: center of the box in pixels; broadcast to the keypoints.
        size: width and height of the box in pixels; broadcast to the keypoints.
    """
    return (keypoints - center) / size


def image_box(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return center and size of the box of a whole image, float32 (2,) each, in pixels."""
    size = torch.tensor([images.shape[3], images.shape[2]], dtype=torch.float32)
    size = size.to(images.device, non_blocking=True)
    return (size - 1) / 2, size


def torso_diameters(keypoints: Tensor, torso: tuple[int, int], min_diameter: float) -> Tensor:
    """Return the distance from left shoulder to right hip, diam(y) of section 3.2: float (B,) in pixels.

    Args:
        keypoints: float (B, K, 2) in pixels.
        torso: indices of the left shoulder and the right hip.
        min_diameter: smallest result in pixels.
    """
    shoulder, hip = torso
    return torch.linalg.vector_norm(keypoints[:, shoulder] - keypoints[:, hip], dim=-1).clamp_min(min_diameter)


def crop_squares(images: Tensor, center: Tensor, side: Tensor, crop_size: int) -> Tensor:
    """Crop squares and resize them bilinearly: float32 (B, n, 3, c, c), 0 outside of the image.

    Pixel j of a crop samples the image at center + ((j + 0.5) / crop_size - 0.5) * side.

    Args:
        images: float (B, 3, H, W).
        center: centers of the squares, float (B, n, 2) in pixels.
        side: side of the squares, float (B,) in pixels.
        crop_size: side of the result in pixels, c.
    """
    height, width = images.shape[2:]
    line = (torch.arange(crop_size, device=images.device) + 0.5) / crop_size - 0.5
    x, y = (center[..., i, None] + line * side[:, None, None] for i in (0, 1))  # (B, n, c) each
    x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), -1)
    # One call samples all crops of an image, stacked vertically; the image need not be repeated.
    crops = F.grid_sample(images.float(), grid.flatten(1, 2).float(), align_corners=False)
    return crops.unflatten(2, (-1, crop_size)).transpose(1, 2)


def error_moments(prediction: Tensor, target: Tensor, valid: Tensor, diameter: Tensor) -> Tensor:
    """Return count, sums and sums of squares of each joint's errors in torso diameters: float64 (K, 5).

    Args:
        prediction: float (B, K, 2) in pixels.
        target: float (B, K, 2) in pixels.
        valid: bool (B, K).
        diameter: float (B,), torso diameters in pixels.
    """
    error = ((prediction - target) / diameter[:, None, None]).double()
    row = torch.cat([torch.ones_like(error[..., :1]), error, error.square()], -1)
    return torch.where(valid[..., None], row, 0).sum(0)


def fit_gaussian(moments: Tensor) -> Tensor:
    """Return mean and standard deviation of each joint's errors along x and y: float32 (2, K, 2).

    Args:
        moments: sum of `error_moments` over the training set; joints without a label get 0.
    """
    count = moments[:, :1].clamp_min(1)
    mean = moments[:, 1:3] / count
    variance = moments[:, 3:] / count - mean.square()
    return torch.stack([mean, variance.clamp_min(0).sqrt()]).float()


# --- loss -------------------------------------------------------------------------------------------------------------


def joint_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Sum squared distances over valid joints and average over people (equation 4): float32.

    Args:
        prediction: float (B, n, 2).
        target: float (B, n, 2).
        valid: bool (B, n).
    """
    squares = (prediction.float() - target.float()).square().sum(2)
    return torch.where(valid, squares, 0).sum() / len(squares)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(normalized: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """Invert `encode`: keypoints in pixels."""
    return normalized * size + center


# --- module -----------------------------------------------------------------------------------------------------------

#: Metrics of each stage, beside those of `pose_metrics` for the last one.
STAGE_METRICS: dict[str, dict[str, Callable[..., Metric]]] = {"pckh": {"pckh": PCKh}, "pck": {"pck": PCK, "pcp": PCP}}


class DeepPose(StagedModule):
    """DeepPose with its cascade (Toshev and Szegedy 2014).

    Batch: see pose in the batch contract. Predictions: ``keypoints`` float32 (B, K, 2) in pixels of the input;
    ``scores`` float32 (B, K), all 1, because a regression gives no confidence; ``stages`` float32 (B, S, K, 2), the
    keypoints after each stage. Stages that are not trained yet return their input. Metrics: `pose_metrics` of the last
    stage, and of each stage as ``stage1/pckh_total`` etc.

    The first stage sees the image resized to ``input_size``. A later stage sees a square crop around the current
    estimate of each joint. Its side is ``sigma`` torso diameters. Crops come from the input image, so
    ``--data.image_size`` should exceed ``input_size``. Stages share the architecture but not the weights; one network
    per stage serves all joints.

    One fit trains the stages one after the other, see `StagedModule`. Between two stages the errors of the last one are
    measured on the augmented training set. The next stage learns from ground-truth joints that are displaced by a
    normal distribution of these errors. The distribution is per joint and axis, in units of the torso diameter.

    Args:
        joint_names: names of the K joints; ``train.py`` takes them from the data. Default: MPII's 16.
        metric: ``pckh`` for MPII, ``pck`` for LSP; data without head boxes has only ``pck``.
        head_boxes: whether the data has head boxes; ``train.py`` takes it from the data.
        backbone: ``alexnet_2014`` (the paper's) or a torchvision classification network.
        weights: null to train from scratch; IMAGENET1K_V1, IMAGENET1K_V2 (ResNets only) or DEFAULT, the newest, for
            torchvision's weights of the backbone; or a file. All stages start from the same weights.
        width_multiplier: factor on all channels and units of ``alexnet_2014``; refused for other backbones.
        dropout: dropout rate after the fully connected layers of ``alexnet_2014``; refused for other backbones.
        batch_norm: batch normalization in ``alexnet_2014`` instead of local response normalization; refused for other
            backbones.
        input_size: input side of the first stage in pixels.
        crop_size: input side of the later stages in pixels. Default: ``input_size``.
        stage_epochs: number of epochs of each of the S stages; the last stage lasts until the end of the run.
        sigma: side of the crops in torso diameters; the paper uses 2 for LSP and 1 for FLIC.
        crops_per_person: number of labeled joints that are sampled per person and step in the later stages. The paper
            takes 40 crops per joint in total; here it is about epochs * crops_per_person / K.
        optimizer: makes the optimizer from parameter groups. Default: the paper's AdaGrad.
        schedule: learning-rate schedule of each stage; it must be a function of the step.
        **kwargs: see `VisionModule`.

    Raises:
        UserError: an argument is out of range.
    """

    monitor = ("val/pckh/total", "max")

    def __init__(
        self,
        joint_names: list[str] | None = None,
        metric: Literal["pckh", "pck"] = "pckh",
        head_boxes: bool = True,
        backbone: str = ALEXNET,
        weights: str | None = None,
        width_multiplier: float = 1.0,
        dropout: float = 0.6,
        batch_norm: bool = False,
        input_size: int = 220,
        crop_size: int | None = None,
        stage_epochs: Sequence[int] = (100, 50, 50),
        sigma: float = 2.0,
        crops_per_person: int = 4,
        optimizer: OptimizerFactory = lambda params: torch.optim.Adagrad(params, lr=5e-4),
        schedule: ScheduleFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, **kwargs)
        self.joint_names = list(joint_names or MPII_JOINTS)
        joints = len(self.joint_names)
        if not stage_epochs or min(stage_epochs) < 1:
            raise UserError(f"stage_epochs: expected 1 or more for each of 1 or more stages, found {stage_epochs}")
        if not sigma > 0:
            raise UserError(f"sigma: expected more than 0, found {sigma}")
        if not 1 <= crops_per_person <= joints:
            raise UserError(f"crops_per_person: expected 1 to {joints}, the number of joints, found {crops_per_person}")
        if backbone == ALEXNET and weights is not None:
            raise UserError(f"weights: expected null for {ALEXNET}, found {weights}; choose another backbone")
        missing = [name for name in TORSO if name not in self.joint_names]
        if missing and len(stage_epochs) > 1:
            raise UserError(f"joint_names: expected {' and '.join(TORSO)} for the torso, found no {missing[0]}")
        self.torso = (0, 0) if missing else (self.joint_names.index(TORSO[0]), self.joint_names.index(TORSO[1]))
        self.metric = choose_metric(metric, self.joint_names, head_boxes)
        self.monitor = (f"val/{self.metric}/total", "max")
        self.input_size, self.crop_size = input_size, crop_size or input_size
        self.sigma, self.crops_per_person, self.stage_epochs = sigma, crops_per_person, list(stage_epochs)
        sizes = [self.input_size] + [self.crop_size] * (len(stage_epochs) - 1)
        options = {"width_multiplier": width_multiplier, "dropout": dropout, "batch_norm": batch_norm}
        self.regressors = nn.ModuleList(
            PoseRegressor(joints, backbone, weights, input_size=size, **options) for size in sizes
        )
        for name, default in (("width_multiplier", 1.0), ("dropout", 0.6), ("batch_norm", False)):
            if backbone != ALEXNET and options[name] != default:
                raise UserError(
                    f"{name}: expected {str(default).lower()}, the default, for backbone {backbone}, which has its own "
                    f"layers, found {options[name]}; use backbone {ALEXNET}"
                )
        #: `fit_gaussian` of the errors of each stage that has ended.
        self.gaussians = nn.ModuleList()

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels = self._pixels(batch["image"])
        name = f"stage_{self.stage + 1}"
        if self.stage == 0:
            target = encode(batch["keypoints"], *image_box(pixels))
            return {name: joint_loss(self._regress_image(pixels), target, batch["labeled"])}
        with torch.no_grad():
            initial = decode(self._regress_image(pixels), *image_box(pixels))
        diameter = self._diameters(batch, initial)
        joint, center, valid = self.simulate(batch["keypoints"], batch["labeled"], diameter)
        side = self.sigma * diameter
        crops = crop_squares(pixels, center, side, self.crop_size)
        index = joint[..., None].expand(-1, -1, 2)
        prediction = self._regress_crops(self.regressors[self.stage], crops).gather(2, index[:, :, None]).squeeze(2)
        target = encode(batch["keypoints"].gather(1, index), center, side[:, None, None])
        return {name: joint_loss(prediction, target, valid)}

    def simulate(self, keypoints: Tensor, labeled: Tensor, diameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample joints of each person, displaced like the predictions of the previous stage.

        Args:
            keypoints: float (B, K, 2) in pixels.
            labeled: bool (B, K).
            diameter: float (B,), torso diameters in pixels.

        Returns:
            Index of each sampled joint, int64 (B, n), labeled ones first; displaced coordinates, float (B, n, 2) in
            pixels; and whether the joint is labeled, bool (B, n).
        """
        joint = (torch.rand_like(keypoints[..., 0]) + labeled).topk(self.crops_per_person).indices
        mean, deviation = self.gaussians[self.stage - 1].value[:, joint]  # type: ignore[index]
        displacement = mean + deviation * torch.randn_like(mean)
        sampled = keypoints.gather(1, joint[..., None].expand(-1, -1, 2))
        return joint, sampled + displacement * diameter[:, None, None], labeled.gather(1, joint)

    def _diameters(self, batch: dict[str, Any], prediction: Tensor) -> Tensor:
        """Ground-truth torso diameters (B,); predictions (B, K, 2) replace torsos without labels."""
        labeled = batch["labeled"][:, self.torso].all(1)[:, None, None]
        pose = torch.where(labeled, batch["keypoints"], prediction.float())
        return torso_diameters(pose, self.torso, MIN_TORSO * max(batch["image"].shape[2:]))

    def _pixels(self, images: Tensor | list[Tensor]) -> Tensor:
        if not isinstance(images, Tensor):
            raise UserError("image: expected crops of one person each, found whole images; set --data.crop person")
        return self.preprocess(images)

    def _regress_image(self, pixels: Tensor) -> Tensor:
        """First stage: normalized joints in the whole image, float32 (B, K, 2)."""
        size = (self.input_size, self.input_size)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        return self.regressors[0](pixels)

    def _regress_crops(self, regressor: nn.Module, crops: Tensor) -> Tensor:
        """Later stages: all joints of each crop (B, n, 3, c, c), float32 (B, n, K, 2)."""
        joints = regressor(crops.flatten(0, 1).contiguous(memory_format=self.memory_format))
        return joints.unflatten(0, crops.shape[:2])

    # --- stages -------------------------------------------------------------------------------------------------------

    def stage_modules(self) -> Sequence[nn.Module]:
        return list(self.regressors)

    def plan_stages(self, total_steps: int) -> list[int]:
        steps_per_epoch = ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        ends = [min(total_steps, end * steps_per_epoch) for end in accumulate(self.stage_epochs)]
        return [*ends[:-1], total_steps]

    def on_stage_end(self) -> None:
        if len(self.gaussians) == self.stage:
            self.gaussians.append(Constant(self._measure_errors()))

    @torch.no_grad()
    def _measure_errors(self) -> Tensor:
        """`fit_gaussian` of the last stage's errors on the training set, over all ranks."""
        moments = torch.zeros(len(self.joint_names), 5, dtype=torch.float64, device=self.device)
        for batch in self.training_batches():
            prediction = self.predict(batch["image"])["keypoints"]
            diameter = self._diameters(batch, prediction)
            moments += error_moments(prediction, batch["keypoints"], batch["labeled"], diameter)
        gaussian = fit_gaussian(self.trainer.strategy.reduce(moments, reduce_op="sum"))
        mean, deviation = (values.square().mean().sqrt().item() for values in gaussian)
        rank_zero_only(print)(
            f"DeepPose: errors of stage {self.stage + 1}: mean {mean:.3f}, deviation {deviation:.3f} torso diameters",
            flush=True,
        )
        return gaussian

    def stage_state(self) -> dict[str, Any]:
        return {"gaussians": [gaussian.value.cpu() for gaussian in self.gaussians]}  # type: ignore[union-attr, operator]

    def load_stage_state(self, state: dict[str, Any]) -> None:
        self.gaussians = nn.ModuleList(Constant(gaussian.to(self.device)) for gaussian in state["gaussians"])

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        pixels = self._pixels(images)
        stages = [decode(self._regress_image(pixels), *image_box(pixels))]
        for number, regressor in enumerate(self.regressors):
            if number > 0:
                stages.append(self.refine(regressor, pixels, stages[-1]) if number <= self.stage else stages[-1])
        return {
            "keypoints": stages[-1],
            "scores": torch.ones_like(stages[-1][..., 0]),
            "stages": torch.stack(stages, 1),
        }

    def refine(self, regressor: nn.Module, pixels: Tensor, keypoints: Tensor) -> Tensor:
        """Refine each joint from a crop around it (equation 6): float32 (B, K, 2) in pixels.

        Args:
            regressor: maps crops (N, 3, c, c) to joints (N, K, 2), as `PoseRegressor`.
            pixels: normalized images, float (B, 3, H, W).
            keypoints: predictions of the previous stage, float (B, K, 2) in pixels.
        """
        side = self.sigma * torso_diameters(keypoints, self.torso, MIN_TORSO * max(pixels.shape[2:]))
        joints = self._regress_crops(regressor, crop_squares(pixels, keypoints, side, self.crop_size))
        # Output i of the crop around joint i.
        return keypoints + joints.diagonal(dim1=1, dim2=2).mT * side[:, None, None]

    def build_metrics(self) -> MetricCollection:
        metrics = dict(pose_metrics(self.joint_names, self.metric).items(keep_base=True))
        for i in range(len(self.regressors)):
            for name, kind in STAGE_METRICS[self.metric].items():
                metrics[f"stage{i + 1}_{name}"] = kind(self.joint_names, prefix=f"stage{i + 1}/{name}_")
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        target = apply_affine(batch["keypoints"], batch["to_original"])
        stages = [apply_affine(stage, batch["to_original"]) for stage in predictions["stages"].unbind(1)]
        for name, metric in metrics.items(keep_base=True):
            number = int(name[len("stage")]) - 1 if name.startswith("stage") else -1
            metric.update(stages[number], target, batch["labeled"], batch["head_size"])
