"""Every system's prediction has exactly one view, and a new view is one file and one entry."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import callbacks.figures
import lightning_modules
import visualization.views
from callbacks.figures import Figures
from callbacks.prediction_writer import PredictionWriter
from cli.messages import class_names
from lightning_modules.classification.attributes import AttributeClassifier
from lightning_modules.classification.emotion import EmotionClassifier
from lightning_modules.classification.image_classifier import ImageClassifier
from lightning_modules.detection.fast_rcnn import FastRCNN
from lightning_modules.detection.faster_rcnn import FasterRCNN
from lightning_modules.detection.overfeat import OverFeat
from lightning_modules.detection.rcnn import RCNN
from lightning_modules.detection.rpn import RPN
from lightning_modules.detection.sliding_window import SlidingWindow
from lightning_modules.detection.ssd import SSD
from lightning_modules.detection.yolo_v1 import YOLOv1
from lightning_modules.detection.yolo_v2 import YOLOv2
from lightning_modules.pose.deeppose import DeepPose
from lightning_modules.pose.keypoint_rcnn import KeypointRCNN
from lightning_modules.pose.orientation import OrientationRegressor
from lightning_modules.pose.stacked_hourglass import StackedHourglass
from lightning_modules.segmentation.deconvnet import DeconvNet
from lightning_modules.segmentation.deeplab import DeepLab
from lightning_modules.segmentation.deeplab_v3 import DeepLabV3
from lightning_modules.segmentation.encoder_decoder import EncoderDecoder
from lightning_modules.segmentation.fcn import FCN
from lightning_modules.segmentation.mask_rcnn import MaskRCNN
from lightning_modules.segmentation.patch_classifier import PatchClassifier
from lightning_modules.style.adain import AdaIN
from lightning_modules.style.base import OptimizedImage
from lightning_modules.style.fast_style import FastStyle
from lightning_modules.style.feature_inversion import FeatureInversion
from lightning_modules.style.inversion_network import InversionNetwork
from lightning_modules.style.neural_style import NeuralStyle
from lightning_modules.style.style_prediction import StylePrediction
from lightning_modules.style.texture_synthesis import TextureSynthesis
from tests.callbacks.tiny import Files, Tiny, loader, trainer, write_image
from visualization.attributes import AttributesView
from visualization.base import PredictionView, Table
from visualization.classification import ClassificationView
from visualization.detections import DetectionView
from visualization.faces import FacesView
from visualization.instance_masks import InstanceMaskView
from visualization.orientation import OrientationView
from visualization.people import PeopleView
from visualization.poses import PoseView
from visualization.samples import Sample, samples_of
from visualization.segmentation import SegmentationView
from visualization.style import StyleView
from visualization.views import VIEWS, view_of
from visualization.yolo_grid import YOLOGridView

RCNN_OPTIONS: dict[str, Any] = {
    "width_multiplier": 0.05,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_test": 5,
    "score_threshold": 0.0,
}
# A tiny system, the side of its input in pixels, and the view of its predictions.
SYSTEMS: dict[str, tuple[Any, int, type[PredictionView]]] = {
    "ImageClassifier": (lambda: ImageClassifier("resnet20_cifar", 3), 32, ClassificationView),
    "AttributeClassifier": (
        lambda: AttributeClassifier(backbone="resnet20_cifar", attributes={"cuisine": ["Greek", "Thai"]}),
        32,
        AttributesView,
    ),
    "EmotionClassifier": (lambda: EmotionClassifier(), 96, FacesView),
    "SlidingWindow": (lambda: SlidingWindow(num_classes=2), 96, DetectionView),
    "OverFeat": (lambda: OverFeat(num_classes=2, width_multiplier=0.05), 256, DetectionView),
    "YOLOv1": (lambda: YOLOv1(num_classes=2, width_multiplier=0.05, input_size=128, grid_size=2), 128, YOLOGridView),
    "YOLOv2": (lambda: YOLOv2(num_classes=2, width_multiplier=0.05), 64, DetectionView),
    "SSD": (lambda: SSD(num_classes=2, width_multiplier=0.05), 300, DetectionView),
    "RPN": (lambda: RPN(width_multiplier=0.05, rpn_post_nms_top_n_test=5), 64, DetectionView),
    "RCNN": (lambda: RCNN(num_classes=2, width_multiplier=0.05), 64, DetectionView),
    "FastRCNN": (lambda: FastRCNN(num_classes=2, width_multiplier=0.05), 64, DetectionView),
    "FasterRCNN": (lambda: FasterRCNN(num_classes=2, **RCNN_OPTIONS), 64, DetectionView),
    "MaskRCNN": (lambda: MaskRCNN(num_classes=2, **RCNN_OPTIONS), 64, InstanceMaskView),
    "KeypointRCNN": (lambda: KeypointRCNN(**RCNN_OPTIONS), 64, PeopleView),
    "FCN": (lambda: FCN(num_classes=3, width_multiplier=0.05), 64, SegmentationView),
    "DeconvNet": (lambda: DeconvNet(num_classes=3, width_multiplier=0.02, inference="image"), 64, SegmentationView),
    "DeepLab": (lambda: DeepLab(num_classes=3, width_multiplier=0.05), 64, SegmentationView),
    "DeepLabV3": (lambda: DeepLabV3(num_classes=3, width_multiplier=0.05), 64, SegmentationView),
    "EncoderDecoder": (lambda: EncoderDecoder(num_classes=3), 64, SegmentationView),
    "PatchClassifier": (
        lambda: PatchClassifier(num_classes=3, width_multiplier=0.05, patch_size=32),
        64,
        SegmentationView,
    ),
    "DeepPose": (lambda: DeepPose(width_multiplier=0.02, input_size=64), 64, PoseView),
    "StackedHourglass": (lambda: StackedHourglass(num_stacks=2, channels=8), 64, PoseView),
    "OrientationRegressor": (lambda: OrientationRegressor("resnet20_cifar"), 32, OrientationView),
    "AdaIN": (lambda: AdaIN(weights="random"), 32, StyleView),
    "FastStyle": (lambda: FastStyle(weights="random", width_multiplier=0.1), 32, StyleView),
    "StylePrediction": (lambda: StylePrediction(weights="random"), 32, StyleView),
    "InversionNetwork": (
        lambda: with_encoder(InversionNetwork("pool1", weights="random", image_size=32)),
        32,
        StyleView,
    ),
    "FeatureInversion": (lambda: with_image(FeatureInversion(weights="random")), 32, StyleView),
    "TextureSynthesis": (lambda: with_image(TextureSynthesis(weights="random")), 32, StyleView),
    "NeuralStyle": (lambda: with_image(NeuralStyle(weights="random")), 32, StyleView),
}


def with_image(module: OptimizedImage) -> OptimizedImage:
    """Give a module the image that it optimizes."""
    module.image = torch.nn.Parameter(torch.rand(1, 3, 32, 32))
    return module


def with_encoder(module: InversionNetwork) -> InversionNetwork:
    """Build the frozen encoder, as the trainer does."""
    module.setup("predict")
    return module


def test_every_system_is_tested() -> None:
    lightning_modules.import_all()
    assert sorted(SYSTEMS) == class_names("model")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_systems_prediction_matches_exactly_one_view(name: str) -> None:
    build, side, expected = SYSTEMS[name]
    torch.manual_seed(0)
    module = build().eval()
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    batch = {"image": images, "id": ["a"], **({"style": images} if expected is StyleView else {})}
    with torch.no_grad():
        outputs = module.predict_batch(batch)
    (sample,) = samples_of(outputs, batch, 1)
    assert [type(view) for view in VIEWS if view.matches(sample.prediction)] == [expected]
    view, names = view_of(sample.prediction), getattr(module, "joint_names", None) or module.class_names
    assert view is not None
    record = json.loads(json.dumps(view.record(sample.prediction, names, (1.0, 1.0))))
    assert view.key in record
    assert all(len(row) == len(view.columns(record)) for row in view.rows(record))
    assert view.tile(Image.new("RGB", (side, side)), sample.prediction, {}, names).width > 0


class DepthView(PredictionView):
    """A kind that the project does not have: ``{"depth": float (H, W)}``."""

    key = "depth"

    def matches(self, prediction: Any) -> bool:
        return isinstance(prediction, dict) and "depth" in prediction

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: Any, names: Any, size: tuple[int, int] | None = None
    ) -> Image.Image:
        return image

    def record(self, prediction: Any, names: Any, scale: tuple[float, float]) -> dict[str, Any]:
        return {"depth": float(prediction["depth"].mean())}

    def columns(self, record: dict[str, Any]) -> list[str]:
        return ["mean_depth"]

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        return [[record["depth"]]]

    def table(self, samples: Sequence[Sample], names: Any) -> Table:
        return ["id", "depth"], [[sample.ground_truth["id"], 2.0] for sample in samples]

    def extra_figures(self, samples: Sequence[Sample], names: Any) -> dict[str, Image.Image]:
        return {"depth": Image.new("L", (8, 8))}


class Depth(Tiny):
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return {"depth": torch.full((len(batch["id"]), 4, 4), 2.0)}

    predict_step = validation_step


def test_a_new_view_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualization.views, "VIEWS", (*VIEWS, DepthView()))
    logged: dict[str, Any] = {}
    monkeypatch.setattr(callbacks.figures, "log_to_wandb", lambda trainer, values: logged.update(values))
    trainer(tmp_path / "fit", callbacks=[Figures()]).fit(Depth(), loader(), loader())
    for prefix in ("val_step", "val_depth_step"):
        assert len(list((tmp_path / "fit" / "figures").glob(f"{prefix}=*.png"))) == 1
    assert set(logged) == {"val/figures", "val/predictions", "val/depth"}
    assert logged["val/predictions"][1][0] == ["sample 0", 2.0]
    path, run = write_image(tmp_path / "in" / "a.jpg"), tmp_path / "run"
    writer = PredictionWriter(str(tmp_path / "in"))
    trainer(run, callbacks=[writer]).predict(Depth(), DataLoader(Files([path])), return_predictions=False)  # type: ignore[arg-type]
    (record,) = json.loads((run / "predictions.json").read_text())
    assert record["depth"] == 2.0
    with open(run / "predictions.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"file": str(path), "mean_depth": "2.0"}]
