"""Recall of the first proposals: ``python -m benchmarks.proposal_recall --ckpt_path RPN``.

The comparison of Ren et al. 2015, "Analysis of Recall-to-IoU": the region proposal network and Selective Search on the
same images. The checkpoint is an `RPN`'s or a `FasterRCNN`'s; the boxes of Selective Search are those that ``python -m
tools.proposals`` wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.detection_fps import system_of
from datamodules.detection.voc import VOCDetection
from errors import BrokenImageError, DatasetError, UserError
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.metrics import ProposalRecall
from lightning_modules.detection.rpn import RPN


def measure(module: RPN | FasterRCNN, data: VOCDetection, device: torch.device) -> dict[str, ProposalRecall]:
    """Compute the recall of both methods on the validation images."""
    recalls = {"proposal network": ProposalRecall().to(device), "Selective Search": ProposalRecall().to(device)}
    for batch in data.val_dataloader():
        target = [{key: value.to(device) for key, value in entry.items()} for entry in batch["target"]]
        images = batch["image"]
        images = images.to(device) if isinstance(images, torch.Tensor) else [image.to(device) for image in images]
        maps, sizes = module.extract_features(images)
        proposals = module.propose(module.network.rpn(maps), sizes, 6000, max(ProposalRecall.counts))
        boxes = [b[valid] for b, valid in zip(proposals.boxes, proposals.valid, strict=True)]
        recalls["proposal network"].update([{"boxes": b} for b in boxes], target)
        recalls["Selective Search"].update([{"boxes": b.to(device)} for b in batch["proposals"]], target)
    return recalls


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proposal_recall", description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint of RPN or FasterRCNN")
    parser.add_argument("--data.root", required=True, help="the folder VOCdevkit, or its parent")
    parser.add_argument("--data.proposals", required=True, help="the folder that python -m tools.proposals wrote")
    parser.add_argument("--data.val", nargs="+", help="image sets; default: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        system, given = system_of(options.ckpt_path)
        if system not in (RPN, FasterRCNN):
            raise UserError(f"{options.ckpt_path}: expected a checkpoint of RPN or FasterRCNN, found {system.__name__}")
        sets = getattr(options, "data.val") or given["val"]
        data = VOCDetection(
            getattr(options, "data.root"),
            train=sets,
            val=sets,
            classes=given.get("classes"),
            image_size=given.get("eval_image_size") or given["image_size"],
            proposals=getattr(options, "data.proposals"),
            batch_size=8,
            num_workers=0,
        )
        module = system.load_from_checkpoint(options.ckpt_path, map_location=device, weights_only=True).eval()
        module.to(memory_format=module.memory_format)  # type: ignore[call-overload]
        with torch.inference_mode():
            recalls = measure(module, data, device)
    except (BrokenImageError, DatasetError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.ckpt_path} on {', '.join(sets)}: recall in % of the first N proposals, at IoUs of 0.5 and 0.7,")
    print("and the mean over 0.5, 0.55 to 0.95")
    print(f"{'':20s}" + "".join(f"{f'{n} at {at}':>13}" for n in ProposalRecall.counts for at in (".5", ".7", "all")))
    for name, metric in recalls.items():
        recall = 100 * metric.compute()["recall"]
        print(f"{name:20s}" + "".join(f"{v:13.1f}" for row in recall for v in (row[0], row[4], row.mean())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
