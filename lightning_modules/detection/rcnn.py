"""R-CNN: Girshick, Donahue, Darrell and Malik, "Rich feature hierarchies for accurate object detection", CVPR 2014.

Each proposal is cut out of the image, warped to one size and shown to a classification network, one crop after the
other. The network is fine-tuned; then it stands still, and on what it says linear support vector machines learn the
classes and a linear regression the boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from errors import UserError
from lightning_modules.base import OptimizerFactory, ScheduleFactory, VisionModule
from lightning_modules.components.average_precision import APMethod
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
from lightning_modules.detection.crop_network import Backbone, CropNetwork, from_imagenet, warp
from lightning_modules.detection.metrics import detection_metrics
from lightning_modules.detection.readouts import Readout, Whitening, ridge_objective, svm_objective

# --- target encoding --------------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """P proposals and M objects of each of B images, which are proposals too, N = P + M, and what they overlap.

    Attributes:
        boxes: float32 (B,N,4) xyxy in pixels.
        there: bool (B,N): False fills up.
        own: bool (B,N), the box of an object.
        overlap: float32 (B,N,C), the greatest IoU with an object of each class.
        best: float32 (B,N), the greatest of these.
        label: int64 (B,N), the class of the object that is overlapped most, or for an object's own box its class.
        offset: float32 (B,N,4), how to get to that object's box, see `encode_boxes`.
    """

    boxes: Tensor
    there: Tensor
    own: Tensor
    overlap: Tensor
    best: Tensor
    label: Tensor
    offset: Tensor

    def take(self, index: Tensor) -> Candidates:
        """Those that ``index``, int64 (B,n), names."""

        def of(values: Tensor) -> Tensor:
            if values.ndim == 2:
                return values.gather(1, index)
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))

        return Candidates(*(of(values) for values in self))


def encode(proposals: Tensor, there: Tensor, target: Sequence[dict[str, Tensor]], num_classes: int) -> Candidates:
    """Says of each proposal what it overlaps.

    Args:
        proposals: float (B,P,4) xyxy in pixels.
        there: bool (B,P), where there is one.
        target: boxes float (M,4) xyxy in pixels and labels int64 (M,) of each image.
        num_classes: C.
    """
    objects, labels = pad_targets(target)
    known = (objects[..., 2:] > objects[..., :2]).all(2)
    boxes, there = torch.cat([proposals, objects], 1), torch.cat([there, known], 1)
    own = torch.arange(boxes.shape[1], device=boxes.device).expand_as(there) >= proposals.shape[1]
    iou = batched_box_iou(objects, boxes)
    index = labels[..., None].expand_as(iou)
    overlap = iou.new_zeros(len(boxes), num_classes, boxes.shape[1]).scatter_reduce(1, index, iou, "amax")
    best, chosen = iou.max(1)
    # Of two objects with the same box each is its own.
    itself = torch.arange(labels.shape[1], device=boxes.device).expand_as(labels)
    chosen = torch.cat([chosen[:, : proposals.shape[1]], itself], 1)
    truth = objects.gather(1, chosen[..., None].expand(-1, -1, 4))
    offset = encode_boxes(truth, boxes, (1.0, 1.0, 1.0, 1.0))
    return Candidates(boxes, there, own & there, overlap.mT, best, labels.gather(1, chosen), offset)


def moments_of(candidates: Candidates) -> Tensor:
    """Of a batch, for each class: how many candidates have an IoU of 0.6 with an object of it, the sums of their offsets
    and of their products; and 1, for the batch itself. float64 (C,1+4+16+1)."""
    y = candidates.offset.double()
    row = torch.cat([torch.ones_like(y[..., :1]), y, (y[..., :, None] * y[..., None, :]).flatten(2)], dim=2)
    near = (candidates.there & (candidates.best >= 0.6))[..., None]
    # A product, since index_add on a GPU adds in any order.
    shown = F.one_hot(candidates.label, candidates.overlap.shape[2]).double()
    sums = shown.flatten(0, 1).mT @ torch.where(near, row, 0).flatten(0, 1)
    return F.pad(sums, (0, 1), value=1.0)


def sides_of(candidates: Candidates, drawn: Sample, proposals: Tensor) -> tuple[Tensor, Tensor]:
    """On which side of each machine's margin a candidate belongs, and what it weighs: float32 (B,n,C) each.

    An object's own box belongs above (1, with a weight of 2, as in the authors' code), what overlaps no object of the
    class by 0.3 below (-1), all else nowhere (0). Proposals that were drawn weigh for those that were not, too.

    Args:
        candidates: those drawn.
        drawn: how, all objects as its positives.
        proposals: int64 (B,), how many there were to draw from.
    """
    shown = F.one_hot(candidates.label, candidates.overlap.shape[2]).bool()
    above = drawn.positive[..., None] & shown
    below = drawn.valid[..., None] & (candidates.overlap < 0.3) & ~above
    of_each = proposals / (drawn.valid & ~drawn.positive).sum(1).clamp_min(1)
    weight = torch.where(drawn.positive, 1.0, of_each[:, None])[..., None]
    return above.float() - below.float(), torch.where(above, 2.0, weight)


# --- loss -------------------------------------------------------------------------------------------------------------


def softmax_loss(logits: Tensor, label: Tensor, taken: Tensor) -> Tensor:
    """Fine-tuning: the log loss of logits (K,1+C), label int64 (K,), 0 for background; the mean where ``taken``."""
    entropy = F.cross_entropy(logits.float(), label, reduction="none")
    return torch.where(taken, entropy, 0).sum() / taken.sum().clamp_min(1)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode(
    scores: Tensor,
    boxes: Tensor,
    there: Tensor,
    size: Tensor,
    score_threshold: float = -2.0,
    nms_threshold: float = 0.3,
    top: int = 100,
) -> list[dict[str, Tensor]]:
    """What was found: for each image ``boxes`` float (K,4) xyxy in pixels, ``scores``, ``labels``, best first.

    Args:
        scores: float (B,P,C).
        boxes: float (B,P,C,4) xyxy in pixels.
        there: bool (B,P), where there is a proposal.
        size: float (B,2), width and height of the images in pixels.
        score_threshold, nms_threshold: what is left out.
        top: boxes of each image and class that take part, the best; 100 in the authors' code.
    """
    image, region, label = ((scores > score_threshold) & there[..., None]).nonzero(as_tuple=True)
    found = torch.minimum(boxes[image, region, label].clamp_min(0), size.repeat(1, 2)[image])
    return non_maximum_suppression(found, scores[image, region, label], label, image, len(boxes), nms_threshold, top)


# --- module -----------------------------------------------------------------------------------------------------------

STAGES = ("fine-tuning", "support vector machines", "box regression")


class RCNN(VisionModule):
    """R-CNN. Batch: see detection in the batch contract, with ``proposals``; images may differ in size.

    Predictions: for each image ``boxes`` float32 (K,4) xyxy in pixels, ``scores`` float32 (K,) and ``labels`` int64
    (K,), best first. A score is a support vector machine's: 0 is its boundary, 1 and -1 are its margins; before the
    machines have been trained it is a probability. Where a batch has no proposals, Selective Search is run on its
    images: a second each. Metrics: ``map`` and what else `VOCMeanAP` gives, and COCO's (`COCOMeanAP`).

    One fit has three stages, each a part of its steps:

    1. The network is fine-tuned with 1+C classes, at the schedule that is given, which takes this stage as its whole.
    2. It stands still. One support vector machine a class learns from fc7.
    3. One ridge regression a class learns from pool5 how to move boxes.

    The paper solves 2 and 3 on features cached on disk, hundreds of gigabytes. Here the optimizer minimizes the same
    objectives, of which each batch gives an unbiased estimate, at ``solver_lr``, falling to 0 in a line: both are
    convex. So a run resumes in them as anywhere, and ranks add up. (Normal equations would be exact, but AlexNet's take
    340 MB a class, in every checkpoint.) Which stage a step belongs to follows from its number and the run's length.

    Args:
        backbone, width: see `CropNetwork`.
        num_classes: C; ``train.py`` takes it from the data.
        class_names: one name a class; ``train.py`` takes them from the data.
        weights: None to train from scratch; DEFAULT or a name of torchvision's weights for the backbone; or a file.
            Then the classifier, which is new, learns ten times as fast as the rest, as in the authors' files.
        crop_size: side of the crops in pixels; the paper's 227, 224 for VGG16.
        context: pixels of a crop around its box, on each side.
        crops: an image to fine-tune on, of which a quarter has an IoU of 0.5 with an object; the paper's batch has 128.
        candidates: an image that machines and regressions are trained on: drawn from all proposals, beside the objects.
        crop_batch: crops that go through the network at once where no gradient is needed.
        stages: parts of the run's steps, see above.
        solver_lr: rate of the second and third stage.
        svm_cost: C of the machines, the lower the more they are regularized.
        ridge: lambda of the regression.
        score_threshold, nms_threshold: what is kept of the predictions. Machines' scores may be below 0, and hard
            objects lie below the margin of the background, at -1; probabilities all pass, of which the best are kept.
        ap: how average precision is computed, see `VOCMeanAP`.
        coco: measure COCO's average precision too.
        optimizer: see `VisionModule`; the authors'. Biases learn at twice the rate and do not decay.
        schedule: see `VisionModule`, of the first stage; one that is a function of the step.
        kwargs: mean, std and channels_last of `VisionModule`.
    """

    monitor = ("val/map", "max")

    def __init__(
        self,
        backbone: Backbone = "alexnet",
        num_classes: int = 20,
        class_names: list[str] | None = None,
        width: float = 1.0,
        weights: str | None = None,
        crop_size: int = 227,
        context: float = 16,
        crops: int = 64,
        candidates: int = 2000,
        crop_batch: int = 512,
        stages: Sequence[float] = (0.8, 0.1, 0.1),
        solver_lr: float = 1e-3,
        svm_cost: float = 1e-3,
        ridge: float = 1000.0,
        score_threshold: float = -2.0,
        nms_threshold: float = 0.3,
        ap: APMethod = "area",
        coco: bool = True,
        optimizer: OptimizerFactory = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        schedule: ScheduleFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=self._staged, **kwargs)
        if len(stages) != 3 or min(stages) <= 0 or abs(sum(stages) - 1) > 1e-6:
            raise UserError(f"stages: expected three parts of the run above 0 that add up to 1, found {list(stages)}")
        if not 0 <= 2 * context < crop_size:
            raise UserError(f"context: expected 0 or more and less than half of a crop of {crop_size}, found {context}")
        self.num_classes, self.class_names = num_classes, class_names
        self.crop_size, self.context, self.crops = crop_size, context, crops
        self.candidates, self.crop_batch = candidates, crop_batch
        self.fractions, self.solver_lr, self.svm_cost, self.ridge = list(stages), solver_lr, svm_cost, ridge
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.ap, self.coco = ap, coco
        self.fine_tuning_schedule = schedule
        self.network = CropNetwork(backbone, num_classes, width)
        # At first nothing is an object, and nothing of the background within the margin.
        self.svm = Readout(self.network.fc7_size, num_classes, -1.0)
        self.box = Readout(self.network.pool5_size, 4 * num_classes)
        self.moments = torch.zeros(num_classes, 22, dtype=torch.float64)
        self.whitening: Whitening | None = None
        self.stage, self.finished = 0, 0
        self.ends: list[int] = []
        self.pretrained = weights is not None
        if weights is not None:
            path = find_weights(backbone, weights)
            load_weights(self.network, path, backbone, "classifier", convert=lambda s: from_imagenet(s, backbone))

    # --- training -----------------------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels, _ = pad_images(batch["image"], self.preprocess)
        proposals, there = training_proposals(batch)
        found = encode(proposals, there, batch["target"], self.num_classes)
        self.network.train(self.stage == 0)
        if self.stage == 1:
            return self._svm_losses(pixels, found, there)
        if self.stage == 2:
            return self._box_losses(pixels, found)
        drawn = sample_balanced(found.there & (found.best >= 0.5), found.there & (found.best < 0.5), self.crops, 0.25)
        taken = found.take(drawn.indices)
        label = torch.where(drawn.positive, taken.label + 1, 0)
        logits = self.network.classifier(self._features(pixels, taken.boxes)[1])
        return {"cross_entropy": softmax_loss(logits.flatten(0, 1), label.flatten(), drawn.valid.flatten())}

    def _svm_losses(self, pixels: Tensor, found: Candidates, there: Tensor) -> dict[str, Tensor]:
        self.moments = self.moments.to(pixels.device) + self._add_up(moments_of(found))
        objects = found.own.shape[1] - there.shape[1]
        drawn = sample_balanced(found.own, found.there & ~found.own, self.candidates + objects, 1.0)
        taken = found.take(drawn.indices)
        with torch.no_grad():
            parts = [self._features(pixels, part) for part in self._parts(taken.boxes)]
        pool5, fc7 = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        for readout, features in ((self.svm, fc7), (self.box, pool5)):
            readout.measure(features.flatten(0, 1), drawn.valid.flatten(), self._add_up)
        scores = self.svm(fc7).flatten(0, 1)
        side, weight = (x.flatten(0, 1) for x in sides_of(taken, drawn, there.sum(1)))
        cost = self.svm_cost * self._batches
        objective = svm_objective(scores, side, weight, self.svm.plain(), cost)
        # Divided by what pulls at the machine, so that its steps are as long however many are within the margin.
        hard = (weight * side.abs() * (side * scores < 1)).sum(0).detach()
        return {"svm": (objective / (cost * self._add_up(hard) / self.trainer.world_size).clamp_min(1)).sum()}

    def _box_losses(self, pixels: Tensor, found: Candidates) -> dict[str, Tensor]:
        near = found.there & (found.best >= 0.6)
        drawn = sample_balanced(near, torch.zeros_like(near), self.crops, 1.0)
        taken = found.take(drawn.indices)
        with torch.no_grad():
            pool5 = torch.cat([self._features(pixels, part)[0] for part in self._parts(taken.boxes)], 1)
        offset = self.box(pool5).flatten(0, 1).unflatten(1, (-1, 4))
        mean, forth, _ = self._whitening(pixels.device)
        wanted = ((taken.offset.flatten(0, 1)[:, None] - mean)[..., None] * forth).sum(2)
        weight = torch.where(drawn.valid, near.sum(1, keepdim=True) / drawn.valid.sum(1, keepdim=True).clamp_min(1), 0)
        label = taken.label.flatten()
        plain = self.box.plain()
        objective = ridge_objective(offset, wanted, label, weight.flatten(), plain, self.ridge, self._batches)
        # Divided by about what it curves with, so that one rate is right for all classes.
        moments = self.moments.to(pixels.device)
        examples = self._batches * (moments[:, 0] / moments[:, 21].clamp_min(1)).float()
        return {"box": (objective / (examples + self.ridge)).sum() / 2}

    def _features(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """pool5 and fc7 of the crops of boxes (B,n,4): (B,n,D) each."""
        crops = warp(pixels, boxes, self.crop_size, self.context)
        pool5, fc7 = self.network(crops.to(memory_format=self.memory_format))
        return pool5.unflatten(0, boxes.shape[:2]), fc7.unflatten(0, boxes.shape[:2])

    def _parts(self, boxes: Tensor) -> Sequence[Tensor]:
        return boxes.split(max(1, self.crop_batch // len(boxes)), dim=1)

    def _add_up(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    @property
    def _batches(self) -> int:
        """Batches of an epoch on all ranks: as many times a batch's sum is, on average, that of the whole set."""
        return int(self.trainer.num_training_batches) * self.trainer.world_size

    def _whitening(self, device: torch.device) -> Whitening:
        if self.whitening is None:
            self.whitening = Whitening.of(self.moments.to(device))
        return self.whitening

    # --- stages -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        stage = sum(self.global_step >= end for end in self.ends)
        # What will be done after this step: so a checkpoint and a validation find it.
        self.finished = sum(self.global_step + 1 >= end for end in self.ends)
        if stage != self.stage or batch_idx == self.global_step == 0:
            rank_zero_only(print)(f"R-CNN: step {self.global_step}: {STAGES[stage]}", flush=True)
        self.stage = stage
        loss = super().training_step(batch, batch_idx)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/stage", float(stage), on_step=True, on_epoch=False, batch_size=1)
        if self.trainer.world_size > 1:
            # DDP waits for a gradient of everything; what it gives to those that rest is removed below.
            loss = loss + 0 * torch.stack([p.sum() for p in self._resting()]).sum()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Without a gradient, neither weight decay nor momentum moves them.
        for parameter in self._resting():
            parameter.grad = None

    def _resting(self) -> Iterator[nn.Parameter]:
        parts = (self.network, self.svm, self.box)
        return (p for i, part in enumerate(parts) if i != self.stage for p in part.parameters() if p.requires_grad)

    def parameter_groups(self) -> list[dict[str, Any]]:
        network = self.network
        groups = caffe_groups(nn.ModuleList([network.features, network.fc6, network.fc7]))
        for group in caffe_groups(network.classifier):
            groups.append({**group, "lr_scale": group.get("lr_scale", 1.0) * (10.0 if self.pretrained else 1.0)})
        # Their objectives have their own decay.
        solved = [
            {"params": list(p.parameters()), "weight_decay": 0.0, "lr": self.solver_lr} for p in (self.svm, self.box)
        ]
        return groups + solved

    def _staged(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """Each group's rate over the run's steps: the given schedule in the first stage, a line to 0 in its own."""
        first, second, _ = self.fractions
        self.ends = [round(total * first), round(total * (first + second)), total]
        factor: Callable[[int], float] = lambda step: 1.0  # noqa: E731
        if self.fine_tuning_schedule is not None:
            alone = self.fine_tuning_schedule(SGD([torch.zeros(1)], lr=1.0), max(1, self.ends[0]))
            if not isinstance(alone, LambdaLR):
                raise UserError(f"schedule: expected one that is a function of the step, found {type(alone).__name__}")
            factor = alone.lr_lambdas[0]

        def line(stage: int) -> Callable[[int], float]:
            start, end = self.ends[stage - 1], self.ends[stage]
            return lambda step: min(1.0, max(0.0, (end - step) / max(1, end - start)))

        fine_tuned = len(optimizer.param_groups) - 2
        return LambdaLR(optimizer, [*[factor] * fine_tuned, line(1), line(2)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        readouts = {"svm": self.svm, "box": self.box}
        measured = {name: (r.mean.cpu(), r.norm.cpu()) for name, r in readouts.items() if r.measured}
        checkpoint["rcnn"] = {"finished": self.finished, "moments": self.moments.cpu(), **measured}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["rcnn"]
        self.finished, self.moments, self.whitening = saved["finished"], saved["moments"], None
        for name, readout in (("svm", self.svm), ("box", self.box)):
            if name in saved:
                (readout.mean, readout.norm), readout.measured = saved[name], True

    # --- prediction ---------------------------------------------------------------------------------------------------

    def predict(
        self, images: Tensor | list[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        """See `VisionModule`; proposals float (P,4) xyxy of each image, or None to search for them."""
        pixels, size = pad_images(images, self.preprocess)
        boxes, there = inference_proposals(images, proposals)
        parts = [self._look(pixels, part) for part in self._parts(boxes)]
        scores, moved = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return decode(scores, moved, there, size, self.score_threshold, self.nms_threshold)

    def _look(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B,n,C) of boxes (B,n,4) and where each class moves them, (B,n,C,4), as far as it has been learned."""
        pool5, fc7 = self._features(pixels, boxes)
        scores = self.network.classifier(fc7).float().softmax(2)[..., 1:] if self.finished < 2 else self.svm(fc7)
        moved = boxes[:, :, None].expand(-1, -1, self.num_classes, 4)
        if self.finished == 3:
            mean, _, back = self._whitening(boxes.device)
            offset = (self.box(pool5).unflatten(2, (-1, 4))[..., None] * back).sum(3) + mean
            moved = decode_boxes(offset, moved, (1.0, 1.0, 1.0, 1.0))
        return scores, moved

    def predict_batch(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        return self.predict(batch["image"], batch.get("proposals"))

    def build_metrics(self) -> MetricCollection:
        return detection_metrics(self.num_classes, self.ap, self.coco)

    def update_metrics(self, metrics: MetricCollection, predictions: Any, batch: dict[str, Any]) -> None:
        metrics.update(predictions, batch["target"])
