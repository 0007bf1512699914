from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.confusion_matrix import ConfusionMatrix, confused_pairs
from callbacks.figures import Figures
from tests.callbacks.tiny import NAMES, Tiny, loader, trainer
from visualization.classification import ClassificationView, top_classes
from visualization.drawing import GREEN, RED, fit_square
from visualization.plots import plot_confusion_matrix
from visualization.samples import samples_of
from visualization.views import view_of


def has(picture: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((np.asarray(picture) == color).all(axis=-1).sum() > 100)


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_right_is_green_and_wrong_is_red() -> None:
    image, prediction = Image.new("RGB", (256, 256), (9, 9, 9)), {"probabilities": torch.tensor([0.7, 0.2, 0.1])}
    right = ClassificationView().draw(image, prediction, {"label": torch.tensor(0)}, NAMES)
    wrong = ClassificationView().draw(image, prediction, {"label": torch.tensor(1)}, NAMES)
    unknown = ClassificationView().draw(image, prediction, {}, NAMES)
    assert (has(right, GREEN), has(right, RED)) == (True, False)
    assert (has(wrong, GREEN), has(wrong, RED)) == (False, True)
    assert (has(unknown, GREEN), has(unknown, RED)) == (False, False)
    # The image itself stays as it is, above the text.
    assert np.asarray(right)[:256].tolist() == np.asarray(image).tolist()


def test_bars_are_as_long_as_the_probabilities() -> None:
    picture = ClassificationView().draw(
        Image.new("RGB", (400, 100)), {"probabilities": torch.tensor([0.75, 0.25])}, {}, ["", ""]
    )
    pixels = np.asarray(picture)[100:]
    long = [int((row == (158, 182, 222)).all(axis=-1).sum()) for row in pixels]
    assert max(long) == pytest.approx(0.75 * 384, abs=8)
    assert sorted(set(long))[1] < 0.3 * 400


@pytest.mark.parametrize("name", ["größer", "日本 🐕", "two\nlines", "x" * 500, "", "$a_{", "\x00"])
def test_no_class_name_breaks_the_drawing(name: str) -> None:
    counts = torch.tensor([[2, 1], [0, 3]])
    ClassificationView().draw(
        Image.new("RGB", (30, 500)), {"probabilities": torch.tensor([0.5, 0.5])}, {"label": 1}, [name, name]
    )
    assert plot_confusion_matrix(counts, [name, name], name).width > 100


def test_top_classes_with_fewer_than_five_and_without_names() -> None:
    assert [(i, name) for i, name, _ in top_classes(torch.tensor([0.1, 0.6, 0.3]), None)] == [
        (1, "class 1"),
        (2, "class 2"),
        (0, "class 0"),
    ]


def test_samples_of_lists_dicts_and_strangers() -> None:
    images = [torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(3, 6, 2, dtype=torch.uint8)]
    batch = {"image": images, "id": ["a", "b"], "target": [{"labels": torch.ones(1)}, {"labels": torch.ones(2)}]}
    (first, second) = samples_of([{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(2, 4)}], batch, 5)
    assert (first[0].shape, second[1]["boxes"].shape, second[2]["id"]) == ((3, 4, 5), (2, 4), "b")
    assert view_of(second.prediction) is None
    assert samples_of(None, batch, 5) == []
    assert samples_of({}, [1, 2], 5) == []


def test_fit_keeps_the_shape() -> None:
    square = fit_square(Image.new("RGB", (200, 100), (1, 2, 3)), 64)
    assert square.size == (64, 64)
    assert int((np.asarray(square) == (1, 2, 3)).all(axis=-1).sum()) == 64 * 32


def test_a_run_leaves_sheets_matrix_and_tables(tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[Figures(count=12), ConfusionMatrix()], max_epochs=2, num_sanity_val_steps=2)
    t.fit(Tiny(), loader(), loader())
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        "val_confusion_step=00000003.png",
        "val_confusion_step=00000006.png",
        "val_step=00000003.png",
        "val_step=00000006.png",
    ]
    sheet = Image.open(tmp_path / "figures" / "val_step=00000006.png")
    assert has(sheet, GREEN)
    assert has(sheet, RED)
    assert sheet.width == 4 * (256 + 12) + 12
    rows = read_table(tmp_path / "per_class_val.csv")
    assert [row["class"] for row in rows] == NAMES
    assert [row["count"] for row in rows] == ["4", "0", "8"]
    assert [row["accuracy"] for row in rows] == ["0.75", "", "0.625"]
    assert [row["most_confused_with"] for row in rows] == ["größer", "", "red"]


def test_old_sheets_go_but_the_first_stays(tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[Figures(count=1, keep=3)], max_epochs=6)
    t.fit(Tiny(), loader(), loader())
    steps = sorted(int(path.stem.split("=")[1]) for path in (tmp_path / "figures").iterdir())
    assert steps == [3, 15, 18]


def test_the_test_split_has_its_own_sheet(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[Figures()]).test(Tiny(), loader(), verbose=False)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["test_step=00000000.png"]


def test_a_failure_is_one_line_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "figures").write_text("a file where the folder should be")
    t = trainer(tmp_path, callbacks=[Figures(), ConfusionMatrix()], max_epochs=3)
    t.fit(Tiny(), loader(), loader())
    assert t.current_epoch == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 2


def test_predictions_nobody_draws_are_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(Tiny):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return {"depth": torch.zeros(len(batch["id"]), 4)}

    trainer(tmp_path, callbacks=[Figures()]).fit(Other(), loader(), loader())
    assert not (tmp_path / "figures").exists()
    assert "skipped" not in capsys.readouterr().err


def test_many_classes_give_a_plain_map_and_the_confused_pairs(tmp_path: Path) -> None:
    counts = torch.diag(torch.full((120,), 10))
    counts[3, 7], counts[50, 2] = 6, 30

    class Many(Tiny):
        def on_validation_epoch_end(self) -> None:
            self.epoch_results["val"] = {"confusion_matrix": counts}

    trainer(tmp_path, callbacks=[ConfusionMatrix()]).fit(Many(names=None), loader(), loader())
    rows = read_table(tmp_path / "confused_pairs_val.csv")
    assert [(row["ground_truth"], row["predicted"], row["count"], row["share"]) for row in rows] == [
        ("class 50", "class 2", "30", "0.75"),
        ("class 3", "class 7", "6", "0.375"),
    ]
    assert len(ConfusionMatrix().rows({"confusion_matrix": counts}, None)) == 120
    assert confused_pairs(torch.eye(3), None) == []
