"""All prediction kinds, and the view of a prediction."""

from __future__ import annotations

from typing import Any

from visualization.attributes import AttributesView
from visualization.base import PredictionView
from visualization.classification import ClassificationView
from visualization.detections import DetectionView
from visualization.faces import FacesView
from visualization.instance_masks import InstanceMaskView
from visualization.orientation import OrientationView
from visualization.people import PeopleView
from visualization.poses import PoseView
from visualization.segmentation import SegmentationView
from visualization.style import StyleView
from visualization.yolo_grid import YOLOGridView

VIEWS: tuple[PredictionView, ...] = (
    ClassificationView(),
    AttributesView(),
    FacesView(),
    DetectionView(),
    YOLOGridView(),
    InstanceMaskView(),
    PeopleView(),
    SegmentationView(),
    PoseView(),
    OrientationView(),
    StyleView(),
)


def view_of(prediction: Any) -> PredictionView | None:
    """Return the view of a prediction, None if no view matches."""
    return next((view for view in VIEWS if view.matches(prediction)), None)


def view_of_record(record: dict[str, Any]) -> PredictionView:
    """Return the view that wrote a record of ``predictions.json``."""
    return next(view for view in VIEWS if view.key in record)
