"""Recall of the first proposals: ``python -m benchmarks.proposal_recall --ckpt_path RPN``.

Compare a region proposal network with Selective Search on the same images, as in Ren et al. 2015, "Analysis of
Recall-to-IoU". The checkpoint is that of an `RPN` or a `FasterRCNN`; ``python -m tools.proposals`` writes the boxes of
Selective Search.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.checkpoints import load_system
from benchmarks.timing import find_device
from cli.command import command
from datamodules.detection.voc import VOCDetection
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.metrics import ProposalRecall
from lightning_modules.detection.rpn import RPN

METHODS = ("region proposal network", "Selective Search")


def compute_recalls(module: RPN | FasterRCNN, data: VOCDetection, device: torch.device) -> dict[str, Tensor]:
    """Compute the recall of both methods on the validation images, in 0..1 by number and IoU, float32 (3, 10)."""
    network, search = (ProposalRecall().to(device) for _ in METHODS)
    for batch in data.val_dataloader():
        target = [{key: value.to(device) for key, value in entry.items()} for entry in batch["target"]]
        for i, entry in enumerate(target):
            maps, sizes = module.extract_features(batch["image"][i][None].to(device))
            top_n = module.rpn_pre_nms_top_n_test, max(ProposalRecall.counts)
            original_size = batch["original_size"][i][None].to(device)
            proposals = module.propose(module.network.rpn(maps), sizes, *top_n, original_size)
            network.update([{"boxes": proposals.boxes[proposals.valid]}], [entry])
        search.update([{"boxes": b.to(device)} for b in batch["proposals"]], target)
    return {name: metric.compute()["recall"] for name, metric in zip(METHODS, (network, search), strict=True)}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proposal_recall", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of RPN or FasterRCNN")
    parser.add_argument("--data.root", required=True, help="the folder VOCdevkit or its parent")
    parser.add_argument("--data.proposals", required=True, help="the folder that python -m tools.proposals wrote")
    parser.add_argument("--data.val", nargs="+", help="image sets; default: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    module, arguments_of_data = load_system(options.ckpt_path, (RPN, FasterRCNN), device)
    image_sets = getattr(options, "data.val") or arguments_of_data["val"]
    data = VOCDetection(
        getattr(options, "data.root"),
        train=image_sets,
        val=image_sets,
        classes=arguments_of_data.get("classes"),
        image_size=arguments_of_data.get("eval_image_size") or arguments_of_data["image_size"],
        proposals=getattr(options, "data.proposals"),
        batch_size=8,
        num_workers=0,
    )
    with torch.inference_mode():
        recalls = compute_recalls(module, data, device)
    counts = ProposalRecall.counts
    print(f"{options.ckpt_path} on {', '.join(image_sets)}: recall in percent of the first N proposals,")
    print("at IoUs of 0.5 and 0.7, and the mean over 0.5, 0.55 to 0.95")
    print(f"{'':24s}" + "".join(f"{f'{n} at {iou}':>13}" for n in counts for iou in ("0.5", "0.7", "all")))
    for name, recall in recalls.items():
        values = [100 * value for row in recall for value in (row[0], row[4], row.mean())]
        print(f"{name:24s}" + "".join(f"{value:13.1f}" for value in values))
    network, search = (recalls[name] for name in METHODS)
    for i, count in enumerate(counts):
        ratio = float(network[i].mean() / search[i].mean())
        print(f"ratio {ratio:.2f}: mean recall of the first {count}, {METHODS[0]} / {METHODS[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
