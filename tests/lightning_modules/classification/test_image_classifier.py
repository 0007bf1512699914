"""ImageClassifier: loss, pretrained weights, crops, frozen backbones, precision, learning."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from errors import UserError
from lightning_modules.base import VisionModule
from lightning_modules.classification.base import smoothed_cross_entropy
from lightning_modules.classification.image_classifier import ImageClassifier, ten_crops
from lightning_modules.schedules import Cosine


def tiny(classes=10, **options):
    return ImageClassifier("resnet20_cifar", classes, base_channels=2, **options)


def a_batch(classes=10, size=4, side=32):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, classes, (size,), generator=generator),
        "id": [str(i) for i in range(size)],
    }


def fit(module, train, val=(), **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 1, **options},
    )
    loaders = [DataLoader(list(batches), batch_size=None) for batches in (train, val) if batches]
    trainer.fit(module, *loaders)
    return trainer


# --- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_cross_entropy_against_numpy(smoothing, weights):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 3)) * 3, rng.integers(0, 3, 6)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    w = np.ones(3) if weights is None else np.array(weights)
    target = np.full((6, 3), smoothing / 3)
    target[np.arange(6), labels] += 1 - smoothing
    expected = -(w * target * log_p).sum() / w[labels].sum()
    found = smoothed_cross_entropy(
        torch.from_numpy(logits),
        torch.from_numpy(labels),
        smoothing,
        None if weights is None else torch.tensor(weights),
    )
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_and_weights_reach_the_loss():
    batch, classes = a_batch(3), 3
    torch.manual_seed(0)
    module = tiny(classes, label_smoothing=0.1, class_weights=[1.0, 2.0, 3.0])
    logits = module.network(module.preprocess(batch["image"]))
    expected = smoothed_cross_entropy(logits, batch["label"], 0.1, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(module.losses(batch)["cross_entropy"], expected)


class RareData(pl.LightningDataModule):
    def __init__(self, counts):
        super().__init__()
        self.given = np.repeat(np.arange(len(counts)), counts)

    def labels(self, split):
        assert split == "train"
        return self.given

    def train_dataloader(self):
        return DataLoader([a_batch(3)], batch_size=None)


def test_balanced_class_weights_come_from_the_training_data():
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_steps=1,
    )  # fmt: skip
    torch.manual_seed(0)
    module = tiny(3, class_weights="balanced")
    trainer.fit(module, datamodule=RareData([10, 30, 0]))
    batch = a_batch(3)
    logits = module.network(module.preprocess(batch["image"]))
    # 40 samples of two classes: 40 / (2 * 10) and 40 / (2 * 30); the weight of a class without samples is not used.
    expected = smoothed_cross_entropy(logits, batch["label"], 0.0, torch.tensor([2.0, 2 / 3, 1.0]))
    torch.testing.assert_close(module.losses(batch)["cross_entropy"], expected)


def test_balanced_class_weights_need_a_datamodule_with_labels():
    with pytest.raises(UserError, match="class_weights: balanced needs a datamodule"):
        fit(tiny(class_weights="balanced"), [a_batch()])


def test_auxiliary_losses_are_named_and_weighted():
    module = ImageClassifier("googlenet", 3, aux_loss_weight=0.25)
    for head in (module.network.aux1, module.network.aux2):
        head.dropout.p = 0.0
    module.network.dropout.p = 0.0
    batch = a_batch(3, side=64)
    terms = module.losses(batch)
    outputs = module.network(module.preprocess(batch["image"]))
    assert list(terms) == ["cross_entropy", "aux1", "aux2"]
    torch.testing.assert_close(terms["cross_entropy"], smoothed_cross_entropy(outputs.logits, batch["label"]))
    torch.testing.assert_close(terms["aux1"], 0.25 * smoothed_cross_entropy(outputs.aux_logits1, batch["label"]))
    torch.testing.assert_close(terms["aux2"], 0.25 * smoothed_cross_entropy(outputs.aux_logits2, batch["label"]))
    module.eval()
    assert list(module.losses(batch)) == ["cross_entropy"]
    assert ImageClassifier("googlenet", 3, aux_loss_weight=0).network.aux1 is None


def test_inception_has_one_auxiliary_loss_with_the_authors_weight():
    with torch.device("meta"):
        module = ImageClassifier("inception_v3", 3)
        batch = {"image": torch.empty(2, 3, 299, 299, dtype=torch.uint8), "label": torch.empty(2, dtype=torch.int64)}
    assert module.aux_loss_weight == 0.4
    assert module.input_size == 299
    assert list(module.losses(batch)) == ["cross_entropy", "aux1"]


@pytest.mark.parametrize("ten_crop", [False, True])
def test_nothing_waits_for_the_device(ten_crop):
    # A meta tensor has no value: item(), cpu() and bool() on one raise.
    with torch.device("meta"):
        module = tiny(class_weights=[1.0] * 10, label_smoothing=0.1, ten_crop=ten_crop, input_size=24)
        batch = {"image": torch.empty(4, 3, 32, 32, dtype=torch.uint8), "label": torch.empty(4, dtype=torch.int64)}
        metrics = module.build_metrics()
    module.losses(batch)["cross_entropy"].backward()
    module.eval()
    module.update_metrics(metrics.to("meta"), module.predict(batch["image"]), batch)


# --- images and predictions -----------------------------------------------------------------------------------------


def test_images_are_uint8():
    with pytest.raises(TypeError, match="expected uint8"):
        tiny().predict(torch.rand(1, 3, 32, 32))


def test_predicts_a_list_of_one_size():
    module, images = tiny().eval(), a_batch()["image"]
    with torch.inference_mode():
        found = module.predict(list(images))["probabilities"]
        assert torch.equal(found, module.predict(images)["probabilities"])
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    with pytest.raises(UserError, match="expected images of one size, found 32x32, 32x16; set --data.eval_crop"):
        module.predict([images[0], images[1, :, :16]])


def test_probabilities_are_float32_under_bf16():
    module, images = tiny().eval(), a_batch()["image"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = module.predict(images)["probabilities"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(4), rtol=0, atol=1e-6)


def test_ten_crops_against_slices():
    x = torch.arange(2 * 3 * 8 * 10).view(2, 3, 8, 10)
    five = [x[..., :4, :4], x[..., :4, 6:], x[..., 4:, :4], x[..., 4:, 6:], x[..., 2:6, 3:7]]
    for found, expected in zip(ten_crops(x, 4), five + [crop.flip(3) for crop in five], strict=True):
        assert torch.equal(found, expected)


def test_ten_crop_averages_the_softmax():
    torch.manual_seed(0)
    module, images = tiny(ten_crop=True, input_size=24).eval(), a_batch()["image"]
    with torch.inference_mode():
        found = module.predict(images)["probabilities"]
        softmax = [module.network(module.preprocess(crop)).softmax(1) for crop in ten_crops(images, 24)]
    torch.testing.assert_close(found, sum(softmax) / 10)
    for size, larger in ((32, 37), (224, 256), (227, 256), (299, 342)):
        with pytest.raises(UserError, match=rf"images larger than {size} pixels.*--data.eval_crop_size {larger}$"):
            ten_crops(torch.zeros(1, 3, size, size + 1, dtype=torch.uint8), size)


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_from_own_checkpoint_and_state_dict(tmp_path, capsys):
    source = tiny()
    fit(source, [a_batch()]).save_checkpoint(tmp_path / "own.ckpt")
    torch.save(source.network.state_dict(), tmp_path / "raw.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.network.state_dict().items()}}, tmp_path / "dp.tar")
    for name in ("own.ckpt", "raw.pth", "dp.tar"):
        loaded = tiny(weights=str(tmp_path / name))
        for key, value in source.network.state_dict().items():
            assert key.endswith("num_batches_tracked") or torch.equal(loaded.network.state_dict()[key], value)
        assert capsys.readouterr().out.strip() == f"weights: {tmp_path / name} loaded into resnet20_cifar"


def test_weights_with_another_class_count_keep_the_backbone(tmp_path, capsys):
    source = tiny()
    torch.save(source.network.state_dict(), tmp_path / "raw.pth")
    loaded = tiny(3, weights=str(tmp_path / "raw.pth"))
    assert torch.equal(loaded.network.stage3[2].conv2.weight, source.network.stage3[2].conv2.weight)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "newly initialized: fc.weight (10, 8) -> (3, 8), fc.bias (10,) -> (3,)" in lines[0]


def test_weights_without_auxiliary_heads(tmp_path, capsys):
    source = ImageClassifier("googlenet", 3, aux_loss_weight=0)
    torch.save(source.network.state_dict(), tmp_path / "raw.pth")
    ImageClassifier("googlenet", 3, weights=str(tmp_path / "raw.pth"))
    assert "aux1.conv.conv.weight absent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("https://example.org/a.pth", "found the URL"),
        ("missing.pth", "no file missing.pth"),
        ("DEFAULT", r"expected a file or null for resnet20_cifar \(torchvision has none\)"),
    ],
)
def test_weights_that_cannot_be_found(weights, message):
    with pytest.raises(UserError, match=message):
        tiny(weights=weights)


def test_weights_that_are_not_weights(tmp_path):
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    torch.save(tiny().network.state_dict(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    for name in ("garbage.pth", "list.pth", "module.pth", "cut.pth"):
        with pytest.raises(UserError, match=f"expected a state dict or checkpoint .*{name}"):
            tiny(weights=str(tmp_path / name))


def test_weights_of_another_network(tmp_path):
    torch.save(ImageClassifier("resnet32_cifar", 10, base_channels=2).network.state_dict(), tmp_path / "32.pth")
    with pytest.raises(
        UserError, match=r"weights of resnet20_cifar, found .*32.pth with 72 tensors .* stage1.3.conv1.weight$"
    ):
        tiny(weights=str(tmp_path / "32.pth"))


def test_weights_of_torchvision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as failure:
        ImageClassifier("resnet18", weights="IMAGENET1K_V1")
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    line = str(failure.value)
    assert line.startswith(
        f"weights: download failed (no route to host); fetch {url} and put it at {file}, or train from"
    )
    assert "--model.weights null" in line
    assert "\n" not in line
    with pytest.raises(UserError, match="expected one of IMAGENET1K_V1"):
        ImageClassifier("resnet18", weights="IMAGENET1K_V7")
    torch.save(ImageClassifier("resnet18", 1000).network.state_dict(), file)
    ImageClassifier("resnet18", 5, weights="DEFAULT")
    assert "fc.weight (1000, 512) -> (5, 512)" in capsys.readouterr().out


# --- training -------------------------------------------------------------------------------------------------------


def test_frozen_backbone_stays_bit_identical():
    module = tiny(freeze_backbone=True)
    before = {k: v.clone() for k, v in module.network.state_dict().items()}
    fit(module, [a_batch()] * 3)
    module.train()
    assert not module.network.bn1.training
    assert module.network.fc.training
    for key, value in module.network.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("fc."), key


def test_head_has_its_own_rate():
    module = tiny(head_lr_scale=10)
    optimizer = module.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 1.0])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
    assert len(tiny().configure_optimizers().param_groups) == 1


def test_checkpoint_is_plain_and_needs_neither_functions_nor_the_first_weights(tmp_path):
    torch.save(tiny().network.state_dict(), tmp_path / "raw.pth")
    module = tiny(
        weights=str(tmp_path / "raw.pth"),
        optimizer=lambda params: torch.optim.AdamW(params, 1e-3),
        schedule=lambda optimizer, steps: Cosine(optimizer, steps, 1),
    )
    fit(module, [a_batch()]).save_checkpoint(tmp_path / "own.ckpt")
    (tmp_path / "raw.pth").unlink()
    hparams = torch.load(tmp_path / "own.ckpt", weights_only=True)["hyper_parameters"]
    assert hparams["backbone"] == "resnet20_cifar"
    assert not {"optimizer", "schedule"} & set(hparams)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True).eval()
    images = a_batch()["image"]
    with torch.inference_mode():
        expected = module.eval().predict(images)["probabilities"]
        assert torch.equal(loaded.predict(images)["probabilities"], expected)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label):
    batch = a_batch(3) | {"label": torch.tensor([0, 1, 2, label])}
    with pytest.raises(UserError, match=r"label: expected 0\.\.2 \(num_classes 3\)"):
        fit(tiny(3), [batch])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "check that the data has classes"),
        ({"class_names": ["a"]}, "class_names: expected 10, one per class, found 1"),
        ({"class_weights": [1.0]}, "class_weights: expected 10, one per class, found 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        ImageClassifier("resnet20_cifar", **{"num_classes": 10, "base_channels": 2, **options})


def test_learns_which_channel_has_a_bright_patch():
    pl.seed_everything(0, verbose=False)
    labels = torch.arange(384) % 3
    images = torch.randint(0, 100, (384, 3, 16, 16), dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        y, x = i // 3 % 8, i // 24 % 8
        images[i, label, y : y + 8, x : x + 8] += 100
    train = [{"image": images[i : i + 32], "label": labels[i : i + 32]} for i in range(0, 288, 32)]
    held_out = [{"image": images[288:], "label": labels[288:]}]
    module = ImageClassifier("resnet20_cifar", 3, base_channels=4, schedule=lambda o, n: Cosine(o, n, warmup_steps=8))
    assert isinstance(module, VisionModule)
    trainer = fit(module, train, held_out, max_epochs=3)
    assert trainer.callback_metrics["val/top1"] > 0.95
    assert trainer.callback_metrics["val/loss"] < 0.3
    assert module.epoch_results["val"]["confusion_matrix"].sum() == 96
