"""R-CNN: regions with CNN features.

Girshick, Donahue, Darrell and Malik, "Rich feature hierarchies for accurate object detection and semantic
segmentation", CVPR 2014.

Each proposal is cropped, warped to one size and processed by a classification network on its own. The network is
fine-tuned first. Linear support vector machines and box regression are then trained on its features. The notation of
the shapes is:

    B images, P proposals, M objects, N = P + M candidates, n sampled candidates per image, C classes, D features
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from errors import CheckpointError, UserError
from lightning_modules.base import OptimizerFactory, ScheduleFactory
from lightning_modules.components.boxes import (
    Sample,
    batched_box_iou,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    pad_targets,
    sample_balanced,
)
from lightning_modules.components.external_proposals import inference_proposals, training_proposals
from lightning_modules.components.image_batches import pad_images
from lightning_modules.components.parameter_groups import caffe_groups
from lightning_modules.components.pretrained import find_weights, load_weights
from lightning_modules.components.unsaved import Constant
from lightning_modules.detection.base import Detector
from lightning_modules.detection.crop_network import CropBackbone, CropNetwork, rename_crop_weights, warp_crops
from lightning_modules.detection.linear_models import (
    DeltaWhitening,
    HardExamples,
    LinearModel,
    delta_moments,
    solve_ridge,
    solve_svms,
    svm_objective,
)
from lightning_modules.stages import StagedModule

FINE_TUNING_IOU = 0.5  # section 2.3: candidates with a higher IoU are positives
POSITIVE_FRACTION = 0.25  # section 2.3: 32 positives in a batch of 128
SVM_NEGATIVE_IOU = 0.3  # section 2.3: candidates with a lower IoU are negatives
REGRESSION_IOU = 0.6  # appendix C: candidates with a higher IoU are regressed
UNIT_STD = (1.0, 1.0, 1.0, 1.0)  # deltas are whitened instead

# --- target encoding --------------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """Proposals and ground-truth boxes of a batch with their targets.

    Attributes:
        boxes: float32 (B, N, 4), xyxy in pixels.
        valid: bool (B, N), False for padding.
        is_object: bool (B, N), True for ground-truth boxes.
        class_iou: highest IoU with an object of each class, float32 (B, N, C).
        max_iou: highest IoU with any object, float32 (B, N).
        label: class of the object with the highest IoU; for a ground-truth box its own class; int64 (B, N).
        deltas: regression deltas to that object, float32 (B, N, 4), see `encode_boxes`.
    """

    boxes: Tensor
    valid: Tensor
    is_object: Tensor
    class_iou: Tensor
    max_iou: Tensor
    label: Tensor
    deltas: Tensor

    def select(self, indices: Tensor) -> Candidates:
        """Return the candidates with ``indices``, int64 (B, n)."""
        wide = indices[..., None]
        return Candidates(*(x.gather(1, indices if x.ndim == 2 else wide.expand(-1, -1, x.shape[2])) for x in self))


def encode(proposals: Tensor, valid: Tensor, target: Sequence[dict[str, Tensor]], num_classes: int) -> Candidates:
    """Match proposals and ground-truth boxes to the objects of their images.

    Args:
        proposals: float (B, P, 4), xyxy in pixels.
        valid: bool (B, P), False for padding.
        target: one dict per image with ``boxes`` float (M, 4), xyxy in pixels, and ``labels`` int64 (M,).
        num_classes: C.
    """
    gt_boxes, gt_labels = pad_targets(target)
    gt_valid = (gt_boxes[..., 2:] > gt_boxes[..., :2]).all(2)
    boxes, valid = torch.cat([proposals, gt_boxes], 1), torch.cat([valid, gt_valid], 1)
    is_object = torch.arange(boxes.shape[1], device=boxes.device).expand_as(valid) >= proposals.shape[1]
    iou = batched_box_iou(gt_boxes, boxes)
    index = gt_labels[..., None].expand_as(iou)
    class_iou = iou.new_zeros(len(boxes), num_classes, boxes.shape[1]).scatter_reduce(1, index, iou, "amax")
    max_iou, matched = iou.max(1)
    # A ground-truth box belongs to its own object, also if another object has the same box.
    itself = torch.arange(gt_labels.shape[1], device=boxes.device).expand_as(gt_labels)
    matched = torch.cat([matched[:, : proposals.shape[1]], itself], 1)
    deltas = encode_boxes(gt_boxes.gather(1, matched[..., None].expand(-1, -1, 4)), boxes, UNIT_STD)
    return Candidates(boxes, valid, is_object & valid, class_iou.mT, max_iou, gt_labels.gather(1, matched), deltas)


def svm_targets(candidates: Candidates, sample: Sample, num_proposals: Tensor) -> tuple[Tensor, Tensor]:
    """Return sign and weight of each sampled candidate for each support vector machine: float32 (B, n, C) each.

    Positives (1) are the ground-truth boxes of the class; they weigh 2, as in the authors' code. Negatives (-1) have an
    IoU below 0.3 with all objects of the class. All other candidates are ignored (0). The weights of sampled proposals
    account for those that were not sampled.

    Args:
        candidates: the sampled candidates.
        sample: the sample; its positives are the ground-truth boxes.
        num_proposals: number of proposals that were sampled from, int64 (B,).
    """
    one_hot = F.one_hot(candidates.label, candidates.class_iou.shape[2]).bool()
    positive = sample.positive[..., None] & one_hot
    negative = sample.valid[..., None] & (candidates.class_iou < SVM_NEGATIVE_IOU) & ~positive
    proposal_weight = num_proposals / (sample.valid & ~sample.positive).sum(1).clamp_min(1)
    weight = torch.where(sample.positive, 1.0, proposal_weight[:, None])[..., None]
    return positive.float() - negative.float(), torch.where(positive, 2.0, weight)


# --- loss -------------------------------------------------------------------------------------------------------------


def softmax_loss(logits: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Average the cross entropy of logits (K, 1 + C) with labels int64 (K,), 0 for background, where ``valid``."""
    entropy = F.cross_entropy(logits.float(), label, reduction="none")
    return torch.where(valid, entropy, 0).sum() / valid.sum().clamp_min(1)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(
    scores: Tensor,
    boxes: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    score_threshold: float = -2.0,
    nms_threshold: float = 0.3,
    top_k: int = 100,
) -> list[dict[str, Tensor]]:
    """Turn scores and boxes of all classes into detections, see `non_maximum_suppression`.

    Args:
        scores: float (B, P, C).
        boxes: float (B, P, C, 4), xyxy in pixels.
        valid: bool (B, P), False for padding.
        image_sizes: width and height of the images in pixels, float (B, 2).
        score_threshold: boxes with a lower score are dropped.
        nms_threshold: IoU above which the weaker of two boxes is dropped.
        top_k: boxes per image and class that enter the suppression; 100 in the authors' code.
    """
    image, proposal, label = ((scores > score_threshold) & valid[..., None]).nonzero(as_tuple=True)
    clipped = torch.minimum(boxes[image, proposal, label].clamp_min(0), image_sizes.repeat(1, 2)[image])
    return non_maximum_suppression(
        clipped, scores[image, proposal, label], label, image, len(boxes), nms_threshold, top_k
    )


# --- module -----------------------------------------------------------------------------------------------------------


class RCNN(StagedModule, Detector):
    """R-CNN (Girshick et al. 2014). See `Detector` for batch, predictions and metrics.

    Batches contain ``proposals``; images may differ in size. Prediction without proposals runs Selective Search, about
    a second per image. Scores are those of the support vector machines: 0 is the decision boundary, 1 and -1 are the
    margins. Until the second stage is complete they are probabilities.

    One fit has three stages, see `StagedModule`:

    1. Fine-tuning of the network with 1 + C classes. ``schedule`` applies to this stage alone.
    2. One linear support vector machine per class on fc7 of the frozen network.
    3. One ridge regression of the box deltas per class on pool5.

    Stages 2 and 3 do not use ``optimizer``. They minimize the objectives of the paper with solvers of their own:

    - Stage 2 mines hard negatives in one pass over the training set, as in the authors' code. Each step adds the
      examples of its batch to a cache, which keeps the hardest ones. The machines are solved on the cache about 32
      times on the way, and more exactly at the end. The cache is part of the checkpoint until the pass ends.
    - Stage 3 solves the regression in its first step, on the features of one pass over the training set. A proposal
      near an object takes 18 kB (AlexNet) or 50 kB (VGG-16) of the device's memory, 2 bytes per feature.

    The other steps of these stages only measure. One epoch is enough for each stage.

    Args:
        backbone: ``alexnet``, ``vgg16`` or ``small``, see `CropNetwork`.
        width_multiplier: factor on all channels and units.
        weights: null to train from scratch; IMAGENET1K_V1 or DEFAULT for torchvision's weights of the backbone; or a
            file. The classifier is new and gets ten times the learning rate, as in the authors' files.
        crop_size: side of the crops in pixels; the paper's is 227, VGG16's 224.
        context: pixels of a crop around its box, on each side.
        rois_per_image: crops per image in stage 1. A quarter of them has an IoU of at least 0.5 with an object. The
            paper's batch has 128.
        svm_proposals_per_image: proposals per image that are sampled for stage 2, beside all ground-truth boxes. The
            default takes all of Selective Search, as the authors do.
        svm_cache_size: number of examples that stage 2 keeps. Each takes 8 kB of memory and of the checkpoint for
            AlexNet and VGG-16, 2 bytes per feature.
        crop_batch_size: crops per forward pass where no gradient is needed.
        stage_fractions: fractions of the run's steps for the three stages, rounded to whole epochs in runs
            of three epochs or more. A stage 2 of less than an epoch sees only a part of the training set.
        svm_cost: C of the support vector machines; lower values regularize more.
        ridge_lambda: lambda of the ridge regression.
        score_threshold: detections with a lower score are dropped. The default keeps objects that are hard to
            recognize, whose scores lie below -1, the margin of the background.
        nms_threshold: IoU above which non-maximum suppression drops the weaker of two boxes of one class.
        optimizer: makes the optimizer of stage 1 from parameter groups. Default: the authors' SGD. Biases get twice the
            learning rate and no weight decay.
        schedule: learning-rate schedule of stage 1; it must be a function of the step.
        **kwargs: see `Detector`.

    Raises:
        UserError: an argument is out of range.
    """

    stage_names = ("fine-tuning", "support vector machines", "box regression")

    def __init__(
        self,
        backbone: CropBackbone = "alexnet",
        width_multiplier: float = 1.0,
        weights: str | None = None,
        crop_size: int = 227,
        context: float = 16,
        rois_per_image: int = 64,
        svm_proposals_per_image: int = 2000,
        svm_cache_size: int = 32768,
        crop_batch_size: int = 512,
        stage_fractions: Sequence[float] = (0.8, 0.1, 0.1),
        svm_cost: float = 1e-3,
        ridge_lambda: float = 1000.0,
        score_threshold: float = -2.0,
        nms_threshold: float = 0.3,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        schedule: ScheduleFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            schedule=schedule,
            optimizer=optimizer,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            **kwargs,
        )
        if len(stage_fractions) != 3 or min(stage_fractions) <= 0 or abs(sum(stage_fractions) - 1) > 1e-6:
            raise UserError(
                f"stage_fractions: expected three positive fractions with a sum of 1, found {list(stage_fractions)}"
            )
        if not 0 <= 2 * context < crop_size:
            raise UserError(f"context: expected 0 or more and less than half of a crop of {crop_size}, found {context}")
        for name, value in (("svm_cache_size", svm_cache_size), ("svm_cost", svm_cost), ("ridge_lambda", ridge_lambda)):
            if value <= 0:
                raise UserError(f"{name}: expected a number above 0, found {value}")
        self.crop_size, self.context, self.svm_cache_size = crop_size, context, svm_cache_size
        self.rois_per_image, self.svm_proposals_per_image = rois_per_image, svm_proposals_per_image
        self.crop_batch_size, self.stage_fractions = crop_batch_size, list(stage_fractions)
        self.svm_cost, self.ridge_lambda = svm_cost, ridge_lambda
        self.network = CropNetwork(backbone, self.num_classes, width_multiplier)
        # Initially all candidates are background, none of them within the margin.
        self.svm = LinearModel(self.network.fc7_size, self.num_classes, initial_output=-1.0)
        self.box_regressor = LinearModel(self.network.pool5_size, 4 * self.num_classes)
        self.hard_examples: HardExamples | None = None  # in stage 2
        self.moments = Constant(torch.zeros(self.num_classes, 21, dtype=torch.float64))
        self._whitening: tuple[Tensor, DeltaWhitening] | None = None  # with the moments that it is computed from
        self.pretrained = weights is not None
        if weights is not None:
            path = find_weights(backbone, weights)
            load_weights(
                self.network,
                path,
                backbone,
                "classifier",
                "fc6",
                "fc7",
                convert=lambda state: rename_crop_weights(state, backbone),
            )

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels, _ = pad_images(batch["image"], self.preprocess)
        proposals, valid = training_proposals(batch)
        candidates = encode(proposals, valid, batch["target"], self.num_classes)
        if self.stage == 0:
            return self._fine_tuning_losses(pixels, candidates)
        if self.stage == 1:
            return self._svm_losses(pixels, candidates, valid)
        return self._regression_losses(pixels, candidates)

    def _fine_tuning_losses(self, pixels: Tensor, candidates: Candidates) -> dict[str, Tensor]:
        foreground = candidates.max_iou >= FINE_TUNING_IOU
        sample = sample_balanced(
            candidates.valid & foreground, candidates.valid & ~foreground, self.rois_per_image, POSITIVE_FRACTION
        )
        sampled = candidates.select(sample.indices)
        label = torch.where(sample.positive, sampled.label + 1, 0)
        logits = self.network.classifier(self._features(pixels, sampled.boxes)[1])
        return {"cross_entropy": softmax_loss(logits.flatten(0, 1), label.flatten(), sample.valid.flatten())}

    def _svm_losses(self, pixels: Tensor, candidates: Candidates, valid: Tensor) -> dict[str, Tensor]:
        mining_ends = self._mining_ends()
        # After the mining, a few candidates suffice for the value that is logged.
        num_proposals = self.svm_proposals_per_image if self.global_step < mining_ends else self.rois_per_image
        max_objects = candidates.is_object.shape[1] - valid.shape[1]
        negative = candidates.valid & ~candidates.is_object
        sample = sample_balanced(candidates.is_object, negative, num_proposals + max_objects, 1.0)
        sampled = candidates.select(sample.indices)
        with torch.no_grad():
            fc7 = torch.cat([self._features(pixels, chunk)[1] for chunk in self._chunks(sampled.boxes)], 1).flatten(
                0, 1
            )
            self.svm.measure(fc7, sample.valid.flatten(), self._sum_over_ranks)
            scores = self.svm(fc7)
            sign, weight = (x.flatten(0, 1) for x in svm_targets(sampled, sample, valid.sum(1)))
            cost = self.svm_cost * self.trainer.num_training_batches * self.trainer.world_size
            objective = svm_objective(scores, sign, weight, self.svm.weight, self.svm.bias, cost)
            if self.global_step < mining_ends:
                # Autocast to bfloat16 refuses to join float16 tensors.
                with torch.autocast(self.device.type, enabled=False):
                    self._mine(HardExamples(self.svm.scale(fc7).half(), sign * weight), scores)
                    self._solve_svms(mining_ends)
        return {"svm": self._without_gradient(objective.sum())}

    def _mining_ends(self) -> int:
        """Return the step at which stage 2 has read the training set once."""
        return min(self.stage_ends[1], self.stage_ends[0] + self._steps_per_epoch)

    @property
    def _steps_per_epoch(self) -> int:
        return ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def _mine(self, examples: HardExamples, scores: Tensor) -> None:
        """Add the examples of a batch to the cache, and keep the hardest."""
        if self.trainer.world_size > 1:
            # All ranks have the same cache. They exchange tensors of one size.
            counts = self.all_gather(torch.tensor(len(scores), device=self.device))
            size = min(int(counts.max()), max(1, self.svm_cache_size // 4))  # type: ignore[union-attr]
            hardest = examples.keep_hardest(scores, size)
            padded = (F.pad(part, (0, 0, 0, size - len(part))) for part in hardest)
            examples = HardExamples(*(self.all_gather(part).flatten(0, 1) for part in padded))  # type: ignore[union-attr]
        if self.hard_examples is not None:
            pairs = zip(self.hard_examples, examples, strict=True)
            examples = HardExamples(*(torch.cat(pair) for pair in pairs))
        self.hard_examples = examples.keep_hardest(self._scores(examples), self.svm_cache_size)

    def _scores(self, examples: HardExamples) -> Tensor:
        """Compute the scores of scaled features: float32 (N, C)."""
        return F.linear(examples.features.float(), self.svm.weight, self.svm.bias)

    def _solve_svms(self, mining_ends: int) -> None:
        """Solve the machines in the last step of the mining, and about 32 times before it, less exactly."""
        assert self.hard_examples is not None
        start, is_last = self.stage_ends[0], self.global_step == mining_ends - 1
        if not is_last and (self.global_step - start) % ceil((mining_ends - start) / 32):
            return
        # A stage of less than an epoch has seen only a part of the training set.
        cost = self.svm_cost * max(1.0, self._steps_per_epoch / (mining_ends - start))
        # Machines that select hard examples need not be exact: an iteration reads the whole cache twice.
        precision: dict[str, Any] = {} if is_last else {"tolerance": 0.05, "max_iterations": 100}
        self.svm.assign(*solve_svms(self.hard_examples, cost, **precision))
        if not is_last:
            return
        sign = self.hard_examples.signed_weights.sign()
        is_hard = (sign * self._scores(self.hard_examples) < sign.abs()).any(1)
        if int(is_hard.sum()) > 0.95 * self.svm_cache_size:
            rank_zero_warn(
                f"svm_cache_size: expected room for all examples within the margins, found {int(is_hard.sum())} in a "
                f"cache of {self.svm_cache_size}; weaker ones may have been dropped; increase it"
            )
        self.hard_examples = None

    def _regression_losses(self, pixels: Tensor, candidates: Candidates) -> dict[str, Tensor]:
        if not self.box_regressor.measured:
            self._solve_box_regression()
        pool5, deltas, label, valid = self._regression_examples(pixels, candidates, self.rois_per_image)
        with torch.no_grad():
            prediction = self.box_regressor(pool5).unflatten(1, (-1, 4))
            prediction = prediction.gather(1, label[:, None, None].expand(-1, 1, 4))[:, 0]
            errors = (prediction - self.whitening().apply(deltas, label)).square().mean(1)
        return {"box": self._without_gradient(torch.where(valid, errors, 0).sum() / valid.sum().clamp_min(1))}

    @torch.no_grad()
    def _regression_examples(self, pixels: Tensor, candidates: Candidates, size: int) -> tuple[Tensor, ...]:
        """Sample candidates near objects of each image: pool5 (K, D), deltas (K, 4), label and valid (K,)."""
        near = candidates.valid & (candidates.max_iou >= REGRESSION_IOU)
        sample = sample_balanced(near, torch.zeros_like(near), size, 1.0)
        sampled = candidates.select(sample.indices)
        pool5 = torch.cat([self._features(pixels, chunk)[0] for chunk in self._chunks(sampled.boxes)], 1)
        return tuple(x.flatten(0, 1) for x in (pool5, sampled.deltas, sampled.label, sample.valid))

    @torch.no_grad()
    def _solve_box_regression(self) -> None:
        """Measure the whitening and solve the ridge regressions, on one pass over the training set of all ranks."""
        batches = []
        for batch in self.training_batches():
            pixels, _ = pad_images(batch["image"], self.preprocess)
            candidates = encode(*training_proposals(batch), batch["target"], self.num_classes)
            most = int((candidates.max_iou >= REGRESSION_IOU).sum(1).amax())
            pool5, deltas, label, valid = self._regression_examples(pixels, candidates, max(1, most))
            batches.append((pool5[valid].half(), deltas[valid], label[valid]))
        with torch.autocast(self.device.type, enabled=False):
            pool5, deltas, label = (torch.cat(parts) for parts in zip(*batches, strict=True))
            self.box_regressor.measure(pool5, torch.ones_like(label, dtype=torch.bool), self._sum_over_ranks)
            self.moments.value = self._sum_over_ranks(delta_moments(deltas, label, self.num_classes))
            targets = self.whitening().apply(deltas, label)
            solutions = []
            for c in range(self.num_classes):
                # The bias is the weight of a constant feature of 1, and is regularized.
                x = F.pad(self.box_regressor.scale(pool5[label == c]), (0, 1), value=1.0)
                solutions.append(solve_ridge(x, targets[label == c], self.ridge_lambda, self._sum_over_ranks))
            beta = torch.cat(solutions, 1).mT
            self.box_regressor.assign(beta[:, :-1], beta[:, -1])

    def _without_gradient(self, value: Tensor) -> Tensor:
        """Return a loss with the gradient 0; stages 2 and 3 do not need the optimizer, but Lightning runs it."""
        parameters = self.stage_modules()[self.stage].parameters()
        return value.detach() + 0 * torch.stack([p.sum() for p in parameters]).sum()

    def _features(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pool5 and fc7 of the crops of boxes (B, n, 4): (B, n, D) each."""
        crops = warp_crops(pixels, boxes, self.crop_size, self.context)
        pool5, fc7 = self.network(crops.to(memory_format=self.memory_format))
        return pool5.unflatten(0, boxes.shape[:2]), fc7.unflatten(0, boxes.shape[:2])

    def _chunks(self, boxes: Tensor) -> Sequence[Tensor]:
        return boxes.split(max(1, self.crop_batch_size // len(boxes)), dim=1)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    def whitening(self) -> DeltaWhitening:
        """Return the whitening of the deltas that were measured in stage 3."""
        moments = self.moments.value
        if self._whitening is None or self._whitening[0] is not moments:
            # The eigenvectors are not computed again in each step.
            self._whitening = moments, DeltaWhitening.from_moments(moments)
        return self._whitening[1]

    # --- stages -------------------------------------------------------------------------------------------------------

    def stage_modules(self) -> Sequence[nn.Module]:
        return self.network, self.svm, self.box_regressor

    def plan_stages(self, total_steps: int) -> list[int]:
        first, second, _ = self.stage_fractions
        ends = [round(total_steps * first), round(total_steps * (first + second)), total_steps]
        epoch = self._steps_per_epoch
        if total_steps < 3 * epoch:
            return ends
        # Stages of whole epochs read each image equally often.
        most = total_steps // epoch - 2
        aligned = [epoch * min(max(i + 1, round(end / epoch)), most + i) for i, end in enumerate(ends[:2])]
        return [*aligned, total_steps]

    def stage_schedule(self, stage: int) -> ScheduleFactory | None:
        return super().stage_schedule(stage) if stage == 0 else None

    def stage_parameter_groups(self, stage: int) -> list[dict[str, Any]]:
        if stage > 0:
            # The solvers set these parameters; the optimizer must not change them.
            return [{**super().stage_parameter_groups(stage)[0], "weight_decay": 0.0, "lr": 0.0}]
        network = self.network
        groups = caffe_groups(nn.ModuleList([network.features, network.fc6, network.fc7]))
        for group in caffe_groups(network.classifier):
            groups.append({**group, "lr_scale": group.get("lr_scale", 1.0) * (10.0 if self.pretrained else 1.0)})
        return groups

    def on_stage_end(self) -> None:
        # The next stage measures its features again, also if a longer run repeats it.
        following = (self.svm, self.box_regressor)[self.stage]
        following.measured = False
        self.hard_examples = None

    def stage_state(self) -> dict[str, Any]:
        models = {"svm": self.svm, "box_regressor": self.box_regressor}
        state = {
            "moments": self.moments.value.cpu(),
            "scaling": {name: model.norm.value.cpu() for name, model in models.items() if model.measured},
        }
        return state if self.hard_examples is None else {**state, "hard_examples": tuple(self.hard_examples)}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        self.moments.value = state["moments"].to(self.device)
        for name, norm in state["scaling"].items():
            if not isinstance(norm, Tensor):
                raise CheckpointError(
                    "RCNN: expected a checkpoint of this version, found one whose linear models use centered features; "
                    "train it again"
                )
            self.get_submodule(name).set_norm(norm)  # type: ignore[operator]
        examples = state.get("hard_examples")
        self.hard_examples = None if examples is None else HardExamples(*(part.to(self.device) for part in examples))

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(
        self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        """See `VisionModule`; proposals are float (P, 4), xyxy, per image, or None for Selective Search.

        The images run one by one: padding them to one size would change the crops at the border of smaller images.
        """
        given = [None] * len(images) if proposals is None else proposals
        return [self.predict_image(image[None], boxes) for image, boxes in zip(images, given, strict=True)]

    def predict_image(self, image: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """Return the detections of one image, uint8 (1, 3, H, W), see `predict`."""
        pixels, image_sizes = pad_images(image, self.preprocess)
        boxes, valid = inference_proposals(image, None if proposals is None else [proposals])
        chunks = [self.score_boxes(pixels, chunk) for chunk in self._chunks(boxes)]
        scores, regressed = (torch.cat(chunk, 1) for chunk in zip(*chunks, strict=True))
        return decode(scores, regressed, valid, image_sizes, self.score_threshold, self.nms_threshold)[0]

    def score_boxes(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (B, n, C) and boxes of each class (B, n, C, 4) with the parts that are trained so far.

        Args:
            pixels: normalized images, float (B, 3, H, W).
            boxes: proposals, float (B, n, 4), xyxy in pixels.
        """
        pool5, fc7 = self._features(pixels, boxes)
        if self.finished_stages < 2:
            scores = self.network.classifier(fc7).float().softmax(2)[..., 1:]
        else:
            scores = self.svm(fc7)
        class_boxes = boxes[:, :, None].expand(-1, -1, self.num_classes, 4)
        if self.finished_stages == 3:
            mean, _, unwhiten = self.whitening()
            deltas = (self.box_regressor(pool5).unflatten(2, (-1, 4))[..., None] * unwhiten).sum(3) + mean
            class_boxes = decode_boxes(deltas, class_boxes, UNIT_STD)
        return scores, class_boxes

    def predict_batch(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        return self.predict(batch["image"], batch.get("proposals"))
