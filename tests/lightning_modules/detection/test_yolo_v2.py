"""YOLOv2: parameter counts, the network against OpenCV's importer of darknet files, the loss against loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from errors import UserError
from lightning_modules.detection.darknet19 import load_darknet_weights
from lightning_modules.detection.yolo_v2 import (
    VOC_ANCHORS,
    AnchorPredictions,
    YOLOv2,
    YOLOv2Network,
    decode,
    encode,
    region_loss,
    reorg,
    train_size_at,
)
from tests.lightning_modules.detection.test_darknet19 import write_weights

ROWS, COLUMNS, C = 3, 4, 3
HEIGHT, WIDTH = 32 * ROWS, 32 * COLUMNS
ANCHORS = torch.tensor([[0.5, 0.6], [1.5, 1.0], [2.0, 2.5]])
A = len(ANCHORS)


# --- network ----------------------------------------------------------------------------------------------------------


def test_the_papers_network() -> None:
    with torch.device("meta"):
        detector = YOLOv2Network()
    assert sum(p.numel() for p in detector.parameters()) == 50_655_389


@pytest.mark.parametrize(("side", "gigamacs"), [(288, 7.04), (352, 10.51), (416, 14.68), (480, 19.55), (544, 25.10)])
def test_any_multiple_of_32(side: int, gigamacs: float) -> None:
    with torch.device("meta"):
        detector = YOLOv2Network()
        with FlopCounterMode(display=False) as counter:
            assert detector(torch.zeros(1, 3, side, side)).shape == (1, side // 32, side // 32, 5, 25)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gigamacs, abs=0.01)


def test_reorg_is_darknets() -> None:
    """The loops of darknet's src/blas.c: reorg_cpu, over positions in memory."""
    x = torch.arange(2 * 8 * 4 * 6.0).view(2, 8, 4, 6)
    source, expected = x.reshape(2, -1), torch.zeros(2, 8 * 4 * 6)
    for channel in range(8):
        for row in range(4):
            for column in range(6):
                offset, into = divmod(channel, 2)
                position = (column * 2 + offset % 2) + 12 * ((row * 2 + offset // 2) + 8 * into)
                expected[:, column + 6 * (row + 4 * channel)] = source[:, position]
    found = reorg(x.to(memory_format=torch.channels_last))
    assert found.shape == (2, 32, 2, 3)
    assert torch.equal(found.reshape(2, -1), expected)
    assert not torch.equal(found, nn.functional.pixel_unshuffle(x, 2))


# --- the authors' files -----------------------------------------------------------------------------------------------


def write_cfg(network: YOLOv2Network, classes: int, side: int, path: Path, region: bool) -> None:
    """Write the authors' yolov2-voc.cfg with the numbers of filters of this network."""
    blocks = [f"[net]\nwidth={side}\nheight={side}\nchannels=3"]

    def conv(module: nn.Sequential) -> None:
        layer = module[0]
        assert isinstance(layer, nn.Conv2d)
        blocks.append(
            f"[convolutional]\nbatch_normalize=1\nfilters={layer.out_channels}\nsize={layer.kernel_size[0]}\n"
            "stride=1\npad=1\nactivation=leaky"
        )

    for module in (*network.fine, *network.coarse, *network.deep):
        if isinstance(module, nn.MaxPool2d):
            blocks.append("[maxpool]\nsize=2\nstride=2")
        else:
            conv(module)  # type: ignore[arg-type]
    blocks.append("[route]\nlayers=-9")
    conv(network.passthrough)
    blocks += ["[reorg]\nstride=2", "[route]\nlayers=-1,-4"]
    conv(network.joined)
    blocks.append(f"[convolutional]\nfilters={network.output.out_channels}\nsize=1\nstride=1\npad=1\nactivation=linear")
    if region:
        anchors = ", ".join(f"{x}" for anchor in VOC_ANCHORS for x in anchor)
        blocks.append(
            f"[region]\nanchors={anchors}\nbias_match=1\nclasses={classes}\ncoords=4\nnum=5\nsoftmax=1\nthresh=0.001"
        )
    path.write_text("\n\n".join(blocks) + "\n")


@pytest.mark.parametrize(
    ("width_multiplier", "side"), [(0.125, 96), pytest.param(1.0, 416, marks=pytest.mark.slow)], ids=["narrow", "full"]
)
def test_equals_opencvs_importer(width_multiplier: float, side: int, tmp_path: Path) -> None:
    classes = 20
    network = YOLOv2Network(classes, width_multiplier=width_multiplier).eval()
    weights, cfg = tmp_path / "x.weights", tmp_path / "x.cfg"
    rng = np.random.default_rng(0)
    write_weights(network, weights, rng)
    assert load_darknet_weights(network, weights) == 23
    image = rng.uniform(0, 1, (1, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        output = network(torch.from_numpy(image))
    cells = side // 32
    write_cfg(network, classes, side, cfg, region=False)
    oracle = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    oracle.setInput(image)
    raw = oracle.forward().reshape(5, 5 + classes, cells, cells).transpose(2, 3, 0, 1)
    assert np.abs(raw).max() > 1  # not trivial
    np.testing.assert_allclose(output[0].numpy(), raw, atol=1e-4 * np.abs(raw).max())

    write_cfg(network, classes, side, cfg, region=True)
    oracle = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    oracle.setInput(image)
    region = oracle.forward().reshape(cells, cells, 5, 5 + classes)
    predictions = AnchorPredictions.split(output)
    boxes = predictions.boxes(torch.tensor(VOC_ANCHORS))[0] / cells
    center, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    scores = (predictions.confidence[..., None] * predictions.logits.softmax(-1))[0].numpy()
    np.testing.assert_allclose(center.numpy(), region[..., :2], atol=1e-4)
    np.testing.assert_allclose(size.numpy(), region[..., 2:4], rtol=1e-3, atol=1e-4)
    kept = region[..., 5:] > 0  # OpenCV sets low scores to 0
    assert kept.mean() > 0.2
    np.testing.assert_allclose(scores[kept], region[..., 5:][kept], atol=1e-4)


def test_the_module_takes_a_file_and_forgets_it(tmp_path: Path) -> None:
    path = tmp_path / "x.weights"
    write_weights(YOLOv2Network(3, width_multiplier=0.05), path, np.random.default_rng(3))
    module = YOLOv2(num_classes=3, width_multiplier=0.05, weights=str(path))
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["hyper_parameters"]["weights"] is None
    with pytest.raises(UserError, match="found no file nowhere.weights"):
        YOLOv2(num_classes=3, width_multiplier=0.05, weights="nowhere.weights")


# --- loss -------------------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def iou(a: Any, b: Any) -> float:
    """Compute the IoU of two boxes (x, y, w, h) with center (x, y)."""
    sides = [
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    ]
    if min(sides) <= 0:
        return 0.0
    intersection = sides[0] * sides[1]
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


def loss_in_loops(output: np.ndarray, target: list[dict[str, torch.Tensor]], early: bool) -> dict[str, float]:
    """Compute the loss like the region layer: all boxes are background, then each object overwrites its predictor."""
    total = dict.fromkeys(("center", "size", "object", "no_object", "class", "prior"), 0.0)
    anchors = ANCHORS.double().numpy()
    for n, t in enumerate(target):
        objects = []
        for box, label in zip(t["boxes"].double().numpy(), t["labels"].tolist(), strict=True):
            w, h = (box[2] - box[0]) / WIDTH, (box[3] - box[1]) / HEIGHT
            if w >= 0.001 and h >= 0.001:
                objects.append(((box[0] + box[2]) / 2 / WIDTH, (box[1] + box[3]) / 2 / HEIGHT, w, h, label))
        terms: dict[tuple[int, int, int], dict[str, float]] = {}
        boxes = {}
        for i in range(ROWS):
            for j in range(COLUMNS):
                for a in range(A):
                    p = output[n, i, j, a]
                    box = (
                        (sigmoid(p[0]) + j) / COLUMNS,
                        (sigmoid(p[1]) + i) / ROWS,
                        math.exp(p[2]) * anchors[a, 0] / COLUMNS,
                        math.exp(p[3]) * anchors[a, 1] / ROWS,
                    )
                    boxes[i, j, a] = box
                    best = max([iou(box, gt_box) for gt_box in objects], default=0.0)
                    terms[i, j, a] = {"no_object": 0.0 if best > 0.6 else sigmoid(p[4]) ** 2 / 2}
                    if early:
                        pulled = (sigmoid(p[0]) - 0.5, sigmoid(p[1]) - 0.5, p[2], p[3])
                        terms[i, j, a]["prior"] = 0.01 / 2 * sum(x**2 for x in pulled)
        for x, y, w, h, label in objects:
            i, j = int(y * ROWS), int(x * COLUMNS)
            shapes = [iou((0, 0, w * COLUMNS, h * ROWS), (0, 0, *anchor)) for anchor in anchors]
            a = int(np.argmax(shapes))
            p = output[n, i, j, a]
            scale = 2 - w * h
            log_w, log_h = math.log(w * COLUMNS / anchors[a, 0]), math.log(h * ROWS / anchors[a, 1])
            logits = p[5:] - p[5:].max()
            terms[i, j, a] = {
                "center": scale
                / 2
                * ((sigmoid(p[0]) - (x * COLUMNS - j)) ** 2 + (sigmoid(p[1]) - (y * ROWS - i)) ** 2),
                "size": scale / 2 * ((p[2] - log_w) ** 2 + (p[3] - log_h) ** 2),
                "object": 5 / 2 * (sigmoid(p[4]) - iou(boxes[i, j, a], (x, y, w, h))) ** 2,
                "class": math.log(np.exp(logits).sum()) - logits[label],
            }
        for entry in terms.values():
            for key, value in entry.items():
                total[key] += value
    return {key: value / len(target) for key, value in total.items()}


def random_case(seed: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Draw outputs and objects: images without objects, crowded cells, tiny objects, distant and close predictions."""
    rng = np.random.default_rng(seed)
    images = int(rng.integers(1, 4))
    output = rng.normal(0, rng.choice([0.2, 1.0, 2.0]), (images, ROWS, COLUMNS, A, 5 + C))
    target = []
    for n in range(images):
        count = int(rng.choice([0, 1, 3, 12]))
        size = rng.choice([0.05, 8.0, 30.0, 90.0], (count, 2)) * rng.uniform(0.5, 1, (count, 2))
        center = rng.uniform(0, 1, (count, 2)) * (WIDTH, HEIGHT)
        if count > 1:  # an object that a prediction matches almost exactly
            predictions = AnchorPredictions.split(torch.from_numpy(output[n : n + 1]))
            box = (predictions.boxes(ANCHORS) * 32).view(-1, 4)[int(rng.integers(ROWS * COLUMNS * A))].numpy()
            center[0], size[0] = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1)
        low, high = (center - size / 2).clip(0), (center + size / 2).clip(None, (WIDTH, HEIGHT))
        boxes = torch.from_numpy(np.concatenate([low, high], 1)).float()
        target.append({"boxes": boxes, "labels": torch.from_numpy(rng.integers(0, C, count))})
    return torch.from_numpy(output).float(), target


def loss_of(output: torch.Tensor, target: list[dict[str, torch.Tensor]], early: bool = False) -> dict[str, Any]:
    targets = encode(target, ANCHORS, (ROWS, COLUMNS), (HEIGHT, WIDTH))
    return region_loss(output, targets, ANCHORS, torch.tensor(early))


def test_the_loss_is_the_region_layers() -> None:
    crowded = empty = tiny = forgiven = 0
    for seed in range(300):
        output, target = random_case(seed)
        early = seed % 2 == 0
        targets = encode(target, ANCHORS, (ROWS, COLUMNS), (HEIGHT, WIDTH))
        terms = region_loss(output, targets, ANCHORS, torch.tensor(early))
        expected = loss_in_loops(output.double().numpy(), target, early)
        for key, value in expected.items():
            assert terms[key].item() == pytest.approx(value, rel=2e-4, abs=1e-5), (seed, key)
        empty += sum(len(t["boxes"]) for t in target) == 0
        tiny += bool((~targets.valid).any())
        crowded += bool((targets.valid & ~targets.assigned).any())
        plain = 0.5 * AnchorPredictions.split(output).confidence.square().flatten()
        plain[targets.predictor[targets.assigned]] = 0
        forgiven += plain.sum().item() / len(output) > terms["no_object"].item() + 1e-5
    assert min(crowded, empty, tiny, forgiven) > 15  # the special cases occurred


def test_the_gradient_is_darknets_delta() -> None:
    """One object by hand: delta = scale * (target - output), through the sigmoid of x, y and confidence."""
    target = [{"boxes": torch.tensor([[40.0, 40, 56, 60]]), "labels": torch.tensor([2])}]
    output = torch.zeros(1, ROWS, COLUMNS, A, 5 + C, requires_grad=True)
    sum(loss_of(output, target).values()).backward()
    gradient = output.grad[0, 1, 1, 0]
    scale = 2 - 16 * 20 / (WIDTH * HEIGHT)
    assert gradient[0].item() == pytest.approx(-scale * (0.5 - 0.5) * 0.25, abs=1e-6)
    assert gradient[1].item() == pytest.approx(-scale * (50 / 32 - 1 - 0.5) * 0.25, abs=1e-6)
    assert gradient[2].item() == pytest.approx(-scale * math.log(16 / 32 / 0.5), abs=1e-6)
    assert gradient[3].item() == pytest.approx(-scale * math.log(20 / 32 / 0.6), abs=1e-6)
    overlap = iou((48, 48, 16, 19.2), (48, 50, 16, 20))
    assert gradient[4].item() == pytest.approx(-5 * (overlap - 0.5) * 0.25, abs=1e-6)
    torch.testing.assert_close(gradient[5:], torch.tensor([1 / 3, 1 / 3, -2 / 3]))
    background = output.grad[0, 0, 3]
    torch.testing.assert_close(background[:, 4], torch.full((A,), 0.5 * 0.25))
    assert (background[:, [0, 1, 2, 3, 5, 6, 7]] == 0).all()


def test_of_two_objects_of_one_anchor_the_last_is_the_target() -> None:
    boxes = torch.tensor([[40.0, 40, 56, 60], [41.0, 41, 57, 61]])
    targets = encode([{"boxes": boxes, "labels": torch.tensor([0, 1])}], ANCHORS, (ROWS, COLUMNS), (HEIGHT, WIDTH))
    assert targets.predictor[0] == targets.predictor[1]
    assert targets.assigned.tolist() == [False, True]


def test_a_batch_without_objects_trains_as_background() -> None:
    output = torch.randn(2, ROWS, COLUMNS, A, 5 + C, requires_grad=True)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    terms = loss_of(output, [empty, empty])
    background = AnchorPredictions.split(output).confidence.square().sum().item() / 4
    assert sum(terms.values()).item() == pytest.approx(background, rel=1e-5)
    sum(terms.values()).backward()
    assert torch.isfinite(output.grad).all()


def test_numbers_that_explode_give_no_nan() -> None:
    output, target = random_case(4)
    assert sum(len(t["boxes"]) for t in target)
    output = (output * 1e4).requires_grad_()
    terms = loss_of(output, target)
    assert all(torch.isfinite(term) for term in terms.values())


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_what_was_encoded_is_decoded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        cells = rng.permutation(ROWS * COLUMNS)[:3]
        center = (np.stack([cells % COLUMNS, cells // COLUMNS], 1) + rng.uniform(0.1, 0.9, (3, 2))) * 32
        size = np.minimum(rng.uniform(4, 60, (3, 2)), 2 * np.minimum(center, (WIDTH, HEIGHT) - center))
        boxes = torch.from_numpy(np.concatenate([center - size / 2, center + size / 2], 1)).float()
        labels = torch.from_numpy(rng.permutation(C)[:3])
        t = encode([{"boxes": boxes, "labels": labels}], ANCHORS, (ROWS, COLUMNS), (HEIGHT, WIDTH))
        output = torch.full((ROWS * COLUMNS * A, 5 + C), -20.0)
        output[t.predictor, :4] = torch.cat([t.xy.logit(), t.log_wh], 1)
        output[t.predictor, 4] = torch.tensor([0.9, 0.8, 0.7]).logit()
        output[t.predictor, 5 + labels] = 20
        output = output.view(1, ROWS, COLUMNS, A, 5 + C)
        (found,) = decode(output, ANCHORS)
        torch.testing.assert_close(found["boxes"], boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8, 0.7]))
        assert found["labels"].tolist() == labels.tolist()
        terms = region_loss(output, t, ANCHORS, torch.tensor(False))
        assert all(terms[key] < 1e-6 for key in ("center", "size", "class"))


def test_boxes_are_clipped_to_the_image_and_duplicates_go() -> None:
    output = torch.full((1, ROWS, COLUMNS, A, 5 + C), -20.0)
    output[0, 0, 0, 2, :4] = torch.tensor([0.0, 0, 2, 2])
    output[0, 0, 0, 1, :4] = torch.tensor([0.0, 0, 2 + math.log(2 / 1.5), 2 + math.log(2.5)])  # the same box
    output[0, 0, 0, 1:, 4] = torch.tensor([0.0, 1.0])
    output[0, 0, 0, 1:, 6] = 20
    (found,) = decode(output, ANCHORS)
    assert found["boxes"].tolist() == [[0, 0, WIDTH * min(1, (0.5 + math.e**2) / 4), HEIGHT]]
    assert found["scores"].item() == pytest.approx(sigmoid(1))
    assert found["labels"].tolist() == [1]


# --- module -----------------------------------------------------------------------------------------------------------


def random_batch(height: int, width: int, images: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    box = torch.tensor([[4.0, 8, width / 2, height / 2]])
    return {
        "image": torch.randint(0, 256, (images, 3, height, width), generator=generator, dtype=torch.uint8),
        "target": [{"boxes": box, "labels": torch.tensor([i % C])} for i in range(images)],
    }


def small_module(**options: Any) -> YOLOv2:
    torch.manual_seed(0)
    return YOLOv2(
        num_classes=C,
        width_multiplier=0.05,
        anchors=[(0.5, 0.6), (1.5, 1.0), (2.0, 2.5)],
        compute_coco_ap=False,
        **options,
    )


def test_every_ten_steps_another_size_that_depends_on_the_step_alone() -> None:
    sizes = [320, 352, 384, 416, 448, 480, 512, 544, 576, 608]
    drawn = [train_size_at(step, sizes) for step in range(10_000)]
    assert all(len(set(drawn[i : i + 10])) == 1 for i in range(0, 10_000, 10))
    counts = [drawn[::10].count(size) for size in sizes]
    assert min(counts) > 70
    assert drawn[777] == train_size_at(777, sizes)


def test_a_training_step_at_another_size() -> None:
    """The loss is that of a batch whose images and boxes have that size."""
    module = small_module(train_sizes=[96])
    entered: list[torch.Tensor] = []
    module.network.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    batch = random_batch(192, 192)
    large = module.losses(batch)
    halved = nn.functional.interpolate(batch["image"].float(), (96, 96), mode="bilinear", antialias=True)
    assert (entered[0] * 255 - halved).abs().max() < 1.01
    image = (entered[0] * 255).round().to(torch.uint8)
    small = module.losses({"image": image, "target": [{**t, "boxes": t["boxes"] / 2} for t in batch["target"]]})
    assert torch.equal(entered[0], entered[1])
    assert all(large[key].item() == pytest.approx(value.item(), rel=1e-4) for key, value in small.items())


def test_a_list_of_images_gives_the_loss_of_the_batch() -> None:
    module = small_module(train_sizes=[96])
    batch = random_batch(192, 192)
    expected = module.losses(batch)
    terms = module.losses({**batch, "image": list(batch["image"])})
    assert {name: term.item() for name, term in terms.items()} == {name: t.item() for name, t in expected.items()}


@pytest.mark.parametrize("channels_last", [True, False])
def test_bf16_and_both_layouts_give_finite_gradients_at_any_size(channels_last: bool) -> None:
    module = small_module(channels_last=channels_last, train_sizes=[64, 96])
    module.setup("fit")
    for size in ((128, 96), (64, 64)):
        with torch.autocast("cpu", torch.bfloat16):
            terms = module.losses(random_batch(*size))
        assert all(term.dtype == torch.float32 for term in terms.values())
        sum(terms.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_the_early_images_are_counted_in_training_alone_and_kept() -> None:
    module = small_module(early_images=3)
    batch = random_batch(64, 64)
    assert module.losses(batch)["prior"] > 0
    module.eval()
    module.losses(batch)
    module.train()
    assert module.seen.item() == 2
    other = small_module(early_images=3)
    other.load_state_dict(module.state_dict())
    assert other.losses(batch)["prior"] > 0
    assert other.losses(batch)["prior"] == 0
    assert other.seen.item() == 6


def test_prediction_takes_multiples_of_32_and_says_so() -> None:
    module = small_module().eval()
    with torch.no_grad():
        for height, width in ((64, 64), (96, 160)):
            (found, _) = module.predict(random_batch(height, width)["image"])
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"].amax(0) <= torch.tensor([width, height, width, height])).all()
        with pytest.raises(UserError, match="multiples of 32 pixels, found 100x64; set --data.image_size 416"):
            module.predict(torch.zeros(1, 3, 64, 100, dtype=torch.uint8))
        with pytest.raises(UserError, match="expected images of one size, found 64x64, 64x96"):
            module.predict([torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 96, 64, dtype=torch.uint8)])


def test_decay_is_for_the_weights_of_convolutions() -> None:
    module = small_module()
    weights, others = module.parameter_groups()
    assert {p.ndim for p in weights["params"]} == {4}
    assert {p.ndim for p in others["params"]} == {1}
    assert others["weight_decay"] == 0
    assert len(weights["params"]) + len(others["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": [(1.0, 0.0)]}, "anchors: expected pairs"),
        ({"anchors": []}, "anchors: expected pairs"),
        ({"train_sizes": [320, 330]}, "train_sizes: expected multiples of 32"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        YOLOv2(num_classes=3, width_multiplier=0.05, **options)
