"""Samples of a batch: image, prediction and ground truth of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """One image of a batch, on the CPU.

    ``image`` is uint8 (3, H, W) as the network received it, ``prediction`` what ``predict`` returned for it, and
    ``ground_truth`` all other entries of the batch (``label``, ``target``, ``id`` ...).
    """

    image: Tensor
    prediction: Any
    ground_truth: dict[str, Any]


def samples_of(outputs: Any, batch: Any, count: int) -> list[Sample]:
    """Take ``count`` samples, spread evenly over the batch.

    Args:
        outputs: predictions: a dict of per-sample tensors or lists, or a list of one prediction per sample.
        batch: a batch that follows the contract of ``datamodules/base.py``; any other gives no samples.
        count: number of samples; all of them if the batch is smaller.
    """
    if outputs is None or not isinstance(batch, dict) or "image" not in batch:
        return []
    samples, size = [], len(batch["image"])
    for i in range(size) if count >= size else (int(k * size / count) for k in range(count)):
        ground_truth = {key: _select(value, i) for key, value in batch.items() if key != "image"}
        samples.append(Sample(batch["image"][i].detach().cpu(), _select(outputs, i), ground_truth))
    return samples


def _select(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return {key: _select(item, i) for key, item in value.items()}
    return _to_cpu(value[i])


def _to_cpu(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _to_cpu(value) for key, value in item.items()}
    return item.detach().cpu() if isinstance(item, Tensor) else item
