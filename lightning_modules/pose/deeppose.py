"""DeepPose: Toshev and Szegedy, "DeepPose: Human Pose Estimation via Deep Neural Networks", CVPR 2014.

A classification network whose last layer says where each joint is. It sees the whole person in few pixels, so others
follow, each of which sees what is around a joint, as the one before it found it, and says how far it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric, MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, ScheduleFactory, VisionModule
from lightning_modules.pose.deeppose_cascade import LEAST, cut, diameters, gaussian_of, moments_of
from lightning_modules.pose.deeppose_network import ALEXNET, PoseRegressor
from lightning_modules.pose.metrics import MPII_JOINTS, PCK, PCP, TORSO, PCKh, apply_affine, pose_metrics

# --- target encoding --------------------------------------------------------------------------------------------------


def normalize(keypoints: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """Equation 2, N(y;b): from pixels to places in a box, 0 its center and +-.5 its edges; all broadcast to (...,2)."""
    return (keypoints - center) / size


def denormalize(places: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """The inverse of `normalize`."""
    return places * size + center


def whole(images: Tensor) -> tuple[Tensor, Tensor]:
    """Center and size, float32 (2,) each as x and y, of the box of a whole image (B,3,H,W), in its pixels."""
    size = torch.tensor([images.shape[3], images.shape[2]], dtype=torch.float32, device=images.device)
    return (size - 1) / 2, size


# --- loss -------------------------------------------------------------------------------------------------------------


def joint_loss(found: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Equation 4: squared distances, summed over the joints that count, the mean over people; float32.

    Args:
        found, target: float (B,n,2).
        counted: bool (B,n).
    """
    squares = (found.float() - target.float()).square().sum(2)
    return torch.where(counted, squares, 0).sum() / len(squares)


# --- module -----------------------------------------------------------------------------------------------------------

# What each stage is measured by, beside what `pose_metrics` says of the last.
STAGE_METRICS: dict[str, dict[str, Callable[..., Metric]]] = {"pckh": {"pckh": PCKh}, "pck": {"pck": PCK, "pcp": PCP}}


class DeepPose(VisionModule):
    """DeepPose with its cascade. Batch: see pose in the batch contract.

    Predictions: ``keypoints`` float32 (B,K,2) in the pixels of the image given; ``scores`` float32 (B,K), all 1, since
    a regression does not say how sure it is; ``stages`` float32 (B,S,K,2), what each stage found, the last of which is
    ``keypoints``. A stage that has not been trained yet changes nothing.

    Metrics: see `pose_metrics`, in the pixels of the images on disk, of the last stage; and of each stage, as
    ``stage1/pckh_total`` and so on.

    The first stage sees the image resized to ``input_size``. A later one sees, of each joint, a square around where the
    one before found it, ``sigma`` torsos wide (from left shoulder to right hip as found there, but at least a tenth of
    the image's side), and moves it. It is cut from the image as given, so that ``--data.image_size`` should be larger
    than ``input_size``. As in the paper a stage is one network for all joints, of which each has its own two outputs;
    stages share the architecture but no weights.

    One fit trains the stages one after the other, while the others stand still. In between, the last one's errors on
    the training set, augmented, are measured; the next one learns from the true joints, displaced at random as these
    errors are: by a normal distribution a joint, along x and y, in units of the true torso, or of that which has been
    found where it is not labeled.

    Args:
        joint_names: K names; ``train.py`` takes them from the data. MPII's 16 by default.
        metric: ``pckh`` for MPII, ``pck`` for LSP.
        backbone, weights, width, dropout, batch_norm: see `PoseRegressor`. All stages begin with the same weights.
        input_size: side in pixels of what a network sees.
        crop_size: the same for the stages after the first; None: as large. Only networks that take any size can differ.
        stage_epochs: how many epochs each of the S stages is trained, one after the other; the last one for the rest.
        sigma: 2 for LSP, 1 for FLIC in the paper.
        crops: of a person in a step of a later stage, of as many joints, drawn from those that are labeled. The paper
            has 40 crops a joint in all, here it is about epochs * crops / K.
        optimizer: see `VisionModule`; the paper's.
        schedule: see `VisionModule`; each stage takes it for itself: one that is a function of the step.
        kwargs: mean, std and channels_last of `VisionModule`.

    Raises:
        ValueError: an argument is out of its range.
    """

    monitor = ("val/pckh/total", "max")

    def __init__(
        self,
        joint_names: list[str] | None = None,
        metric: Literal["pckh", "pck"] = "pckh",
        backbone: str = ALEXNET,
        weights: str | None = None,
        width: float = 1.0,
        dropout: float = 0.6,
        batch_norm: bool = False,
        input_size: int = 220,
        crop_size: int | None = None,
        stage_epochs: Sequence[int] = (100, 50, 50),
        sigma: float = 2.0,
        crops: int = 4,
        optimizer: OptimizerFactory = lambda params: torch.optim.Adagrad(params, lr=5e-4),
        schedule: ScheduleFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=None if schedule is None else self._staged, **kwargs)
        self.joint_names = list(joint_names or MPII_JOINTS)
        if not stage_epochs or min(stage_epochs) < 1:
            raise UserError(f"stage_epochs: expected 1 or more for each of 1 or more stages, found {stage_epochs}")
        if not sigma > 0:
            raise UserError(f"sigma: expected more than 0, found {sigma}")
        if not 1 <= crops <= len(self.joint_names):
            raise UserError(f"crops: expected 1 to {len(self.joint_names)}, the number of joints, found {crops}")
        if backbone == ALEXNET and weights is not None:
            raise UserError(f"weights: there are none for {ALEXNET}, found {weights}: choose another backbone")
        missing = [name for name in TORSO if name not in self.joint_names]
        if missing and len(stage_epochs) > 1:
            raise UserError(f"joint_names: expected {' and '.join(TORSO)} for the torso, found no {missing[0]}")
        self.torso = (0, 0) if missing else (self.joint_names.index(TORSO[0]), self.joint_names.index(TORSO[1]))
        self.metric, self.monitor = metric, (f"val/{metric}/total", "max")
        self.input_size, self.crop_size = input_size, crop_size or input_size
        self.sigma, self.crops = sigma, crops
        self.boundaries = list(accumulate(stage_epochs))
        self.stage_schedule = schedule
        sizes = [self.input_size] + [self.crop_size] * (len(stage_epochs) - 1)
        self.regressors = nn.ModuleList(
            PoseRegressor(len(self.joint_names), backbone, weights, size, width, dropout, batch_norm) for size in sizes
        )
        #: The stage that is trained, from 0, or was trained last.
        self.stage = 0
        #: Of each stage that has a next one in training, its errors, see `gaussian_of`. No buffer: see VisionModule.
        self.gaussians: list[Tensor] = []

    # --- training -----------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels = self._pixels(batch["image"])
        name = f"stage_{self.stage + 1}"
        if self.stage == 0:
            target = normalize(batch["keypoints"], *whole(pixels))
            return {name: joint_loss(self._whole_person(pixels), target, batch["labeled"])}
        self.regressors[0].eval()
        with torch.no_grad():
            found = denormalize(self._whole_person(pixels), *whole(pixels))
        diameter = self._diameters(batch, found)
        joint, center, counted = self.simulate(batch["keypoints"], batch["labeled"], diameter)
        side = self.sigma * diameter
        crops = cut(pixels, center, side, self.crop_size)
        found = self._look(self.regressors[self.stage], crops)
        own = found.gather(2, joint[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
        true = batch["keypoints"].gather(1, joint[..., None].expand(-1, -1, 2))
        return {name: joint_loss(own, normalize(true, center, side[:, None, None]), counted)}

    def simulate(self, keypoints: Tensor, labeled: Tensor, diameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the stage before might have found some joints of each person.

        Args:
            keypoints: float (B,K,2) in pixels.
            labeled: bool (B,K).
            diameter: float (B,) in pixels.

        Returns:
            Of n joints of each person: which they are, int64 (B,n); the places, float (B,n,2) in pixels; and whether
            they count, bool (B,n): a person may have fewer.
        """
        gaussian = self.gaussians[self.stage - 1] = self.gaussians[self.stage - 1].to(keypoints.device)
        joint = (torch.rand_like(keypoints[..., 0]) + labeled).topk(self.crops).indices
        mean, deviation = gaussian[:, joint]
        displacement = mean + deviation * torch.randn_like(mean)
        true = keypoints.gather(1, joint[..., None].expand(-1, -1, 2))
        return joint, true + displacement * diameter[:, None, None], labeled.gather(1, joint)

    def _diameters(self, batch: dict[str, Any], found: Tensor) -> Tensor:
        """`diameters` of the true poses; where their torso is not labeled, of those that were found, (B,K,2)."""
        labeled = batch["labeled"][:, self.torso].all(1)[:, None, None]
        pose = torch.where(labeled, batch["keypoints"], found.float())
        return diameters(pose, self.torso, LEAST * max(batch["image"].shape[2:]))

    def _pixels(self, images: Tensor | list[Tensor]) -> Tensor:
        if not isinstance(images, Tensor):
            raise UserError("image: expected crops of one person each, found whole images: --data.crop person")
        return self.preprocess(images)

    def _whole_person(self, pixels: Tensor) -> Tensor:
        """The first stage's places in the whole image, float32 (B,K,2)."""
        size = (self.input_size, self.input_size)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        return self.regressors[0](pixels)

    def _look(self, regressor: nn.Module, crops: Tensor) -> Tensor:
        """What a stage says of crops (B,n,3,c,c), float32 (B,n,K,2)."""
        found = regressor(crops.flatten(0, 1).contiguous(memory_format=self.memory_format))
        return found.unflatten(0, crops.shape[:2])

    # --- stages -------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        epochs, last = self.trainer.max_epochs, len(self.boundaries)
        reached = sum(end < epochs for end in self.boundaries[:-1]) + 1 if epochs and epochs > 0 else last
        if reached < last:
            rank_zero_warn(
                f"stage_epochs: stage {reached} of {last} is the last that max_epochs {epochs} comes to: "
                f"{self.boundaries[-1]} epochs train them all"
            )

    def on_train_epoch_start(self) -> None:
        stage = sum(self.current_epoch >= end for end in self.boundaries[:-1])
        # A run that resumes within a stage has them from its checkpoint.
        for before in range(len(self.gaussians), stage):
            self.stage = before
            self.gaussians.append(self._measure_errors())
        if stage != self.stage or self.current_epoch == 0:
            rank_zero_only(print)(f"DeepPose: epoch {self.current_epoch}: stage {stage + 1}", flush=True)
        self.stage = stage

    @torch.no_grad()
    def _measure_errors(self) -> Tensor:
        """`gaussian_of` the last stage's errors, over the training set and all ranks."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError("stage_epochs: the errors of a stage are measured on a datamodule's training set: give one")
        loader = data.train_dataloader()
        # From the epoch's beginning, whatever the progress of the training's own loader.
        loader.training, loader.sampler.epoch = False, self.current_epoch
        self._enter_evaluation()
        self.regressors.eval()
        moments = torch.zeros(len(self.joint_names), 5, dtype=torch.float64, device=self.device)
        for batch in islice(loader, int(self.trainer.num_training_batches)):
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            with self.trainer.precision_plugin.forward_context():
                found = self.predict(batch["image"])["keypoints"]
            diameter = self._diameters(batch, found)
            moments += moments_of(found, batch["keypoints"], batch["labeled"], diameter)
        self.regressors.train()
        self._set_buffer_sync(True)
        gaussian = gaussian_of(self.trainer.strategy.reduce(moments, reduce_op="sum"))
        mean, deviation = (values.square().mean().sqrt().item() for values in gaussian)
        rank_zero_only(print)(
            f"DeepPose: stage {self.stage + 1} is off by {mean:.3f} +- {deviation:.3f} torsos along x and y", flush=True
        )
        return gaussian

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/stage", float(self.stage + 1), on_step=True, on_epoch=False, batch_size=1)
        if self.trainer.world_size > 1:
            # DDP waits for a gradient of everything; what it gives to those that rest is removed below.
            loss = loss + 0 * torch.stack([p.sum() for p in self._resting()] or [loss.new_zeros(())]).sum()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Without a gradient, neither weight decay nor momentum moves them.
        for parameter in self._resting():
            parameter.grad = None

    def _resting(self) -> Iterator[nn.Parameter]:
        return (p for i, part in enumerate(self.regressors) if i != self.stage for p in part.parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(regressor.parameters())} for regressor in self.regressors]

    def _staged(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """Each stage's rate: the given schedule over its own part of the run's steps."""
        epochs = self.trainer.max_epochs
        if not epochs or epochs < 1:
            raise UserError("a schedule of stages needs their length: set trainer.max_epochs")
        ends = [min(total, round(total * end / epochs)) for end in self.boundaries[:-1]] + [total]
        factors = [self._factor(start, end) for start, end in pairwise([0, *ends])]
        return LambdaLR(optimizer, factors)

    def _factor(self, start: int, end: int) -> Callable[[int], float]:
        assert self.stage_schedule is not None
        alone = self.stage_schedule(SGD([torch.zeros(1)], lr=1.0), max(1, end - start))
        if not isinstance(alone, LambdaLR):
            raise UserError(f"schedule: expected one that is a function of the step, found {type(alone).__name__}")
        return lambda step: alone.lr_lambdas[0](max(0, step - start))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["deeppose"] = {"stage": self.stage, "gaussians": [values.cpu() for values in self.gaussians]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.stage, self.gaussians = checkpoint["deeppose"]["stage"], list(checkpoint["deeppose"]["gaussians"])

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor | list[Tensor]) -> dict[str, Tensor]:
        pixels = self._pixels(images)
        stages = [denormalize(self._whole_person(pixels), *whole(pixels))]
        for number, regressor in enumerate(self.regressors):
            if number > 0:
                stages.append(self.refine(regressor, pixels, stages[-1]) if number <= self.stage else stages[-1])
        return {
            "keypoints": stages[-1],
            "scores": torch.ones_like(stages[-1][..., 0]),
            "stages": torch.stack(stages, 1),
        }

    def refine(self, regressor: nn.Module, pixels: Tensor, keypoints: Tensor) -> Tensor:
        """Equation 6: joints (B,K,2) moved by what ``regressor`` says of the boxes around them, in pixels as they are.

        Args:
            regressor: crops (N,3,c,c) to (N,K,2), as `PoseRegressor`.
            pixels: normalized float (B,3,H,W).
            keypoints: float (B,K,2), what the stage before found.
        """
        side = self.sigma * diameters(keypoints, self.torso, LEAST * max(pixels.shape[2:]))
        found = self._look(regressor, cut(pixels, keypoints, side, self.crop_size))
        own = found.diagonal(dim1=1, dim2=2).mT
        return keypoints + own * side[:, None, None]

    def build_metrics(self) -> MetricCollection:
        metrics = dict(pose_metrics(self.joint_names, self.metric).items(keep_base=True))
        for i in range(len(self.regressors)):
            for name, kind in STAGE_METRICS[self.metric].items():
                metrics[f"stage{i + 1}_{name}"] = kind(self.joint_names, prefix=f"stage{i + 1}/{name}_")
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]

    def update_metrics(self, metrics: MetricCollection, predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        true = apply_affine(batch["keypoints"], batch["to_original"])
        stages = [apply_affine(found, batch["to_original"]) for found in predictions["stages"].unbind(1)]
        for name, metric in metrics.items(keep_base=True):
            number = int(name[len("stage")]) - 1 if name.startswith("stage") else -1
            metric.update(stages[number], true, batch["labeled"], batch["head_size"])
