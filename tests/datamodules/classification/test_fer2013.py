"""FER2013: both public copies, separate usages, messages for bad rows, and drawn faces that can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from datamodules.classification.fer2013 import EMOTIONS, FER2013, parse_pixels, read_fer2013
from datamodules.synthetic.fer2013 import write_fer2013
from errors import DatasetError

ROW = " ".join(str(i % 256) for i in range(2304))


def csv(folder: Path, *rows: str, header: str = "emotion,pixels,Usage", name: str = "fer2013.csv") -> Path:
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fer2013")
    write_fer2013(str(folder), train=6, val=3)
    return folder


def test_usages_are_never_mixed(drawn: Path) -> None:
    data = FER2013(str(drawn), num_workers=0)
    assert data.class_names == EMOTIONS
    ids: dict[str, set[str]] = {}
    for split, count in (("train", 42), ("val", 21), ("test", 21)):
        dataset = data.dataset(split)  # type: ignore[arg-type]
        samples = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
        ids[split] = {sample["id"] for sample in samples}
        assert len(ids[split]) == count
        assert {tuple(sample["image"].shape) for sample in samples} == {(1, 48, 48)}
        assert {sample["image"].dtype for sample in samples} == {torch.uint8}
        labels = data.labels(split)  # type: ignore[arg-type]
        assert labels is not None
        assert labels.tolist() == [sample["label"] for sample in samples]
    assert not ids["train"] & ids["val"]
    assert not ids["test"] & (ids["train"] | ids["val"])
    rows = (drawn / "fer2013.csv").read_text().splitlines()
    for name in ids["test"]:
        assert rows[int(name.removeprefix("fer2013.csv:")) - 1].endswith(",PrivateTest")


def test_pixels_against_a_plain_reading(drawn: Path) -> None:
    faces = read_fer2013(str(drawn / "fer2013.csv"))
    rows = [row.split(",") for row in (drawn / "fer2013.csv").read_text().splitlines()[1:]]
    expected = np.array([[int(number) for number in row[1].split()] for row in rows])
    assert (faces.pixels.view(-1, 2304).numpy() == expected).all()
    assert expected.max() > 99 > 9 > expected.min(), "numbers of one, two and three digits"
    assert faces.labels.tolist() == [int(row[0]) for row in rows]
    assert faces.lines.tolist() == list(range(2, len(rows) + 2))


@pytest.mark.parametrize(
    ("header", "row", "name"),
    [
        ("emotion,pixels,Usage", "{e},{p},{u}", "fer2013.csv"),
        ("emotion, Usage, pixels", "{e},{u},{p}", "icml_face_data.csv"),
        ("\ufeffemotion, pixels, Usage\r", '{e},"{p}",{u}\r', "fer2013.csv"),
    ],
)
def test_both_copies(tmp_path: Path, header: str, row: str, name: str) -> None:
    rows = [row.format(e=e, p=ROW, u=u) for e, u in ((3, "Training"), (6, "PublicTest"), (0, "PrivateTest"))]
    csv(tmp_path, *rows, "", header=header, name=name)
    for root in (tmp_path, tmp_path / name):
        data = FER2013(str(root), num_workers=0)
        assert [data.labels(split).tolist() for split in ("train", "val", "test")] == [[3], [6], [0]]  # type: ignore
        assert data.dataset("val")[0]["image"].flatten().tolist() == [i % 256 for i in range(2304)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (f"3,{ROW[:-4]},Training", r"line 3: expected 2304 pixels \(48x48\), found 2303"),
        (f"3,{ROW} 7,Training", "line 3: expected 2304 pixels .* found 2305"),
        (f"7,{ROW},Training", "line 3: expected an emotion of 0 angry, 1 disgust, .* found '7'"),
        (f"-1,{ROW},Training", "line 3: expected an emotion .* found '-1'"),
        (f"3,256{ROW[1:]},Training", "line 3: expected pixels of 0 to 255, found '256'"),
        (f"3,1000{ROW[1:]},Training", "line 3: expected pixels of 0 to 255, found '1000'"),
        (f"3,-1{ROW[1:]},Training", "line 3: expected pixels of 0 to 255 .* found '-1'"),
        (f"3,0.5{ROW[1:]},Training", "line 3: expected pixels of 0 to 255 .* found '0.5'"),
        (f"3,{ROW},Validation", "line 3: expected Usage Training or PublicTest or PrivateTest, found 'Validation'"),
        (f"3,{ROW[:2000]}", "line 3: expected 3 fields, found 2; is the file complete"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, expected: str) -> None:
    good = f"3,{ROW},Training"
    data = FER2013(str(csv(tmp_path, good, row, good)), num_workers=0)
    with pytest.raises(DatasetError, match=f"fer2013.csv, {expected}") as error:
        data.dataset("train")
    assert len(str(error.value).splitlines()) == 1


def test_utf16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_bytes("emotion,pixels,Usage\n".encode("utf-16"))
    with pytest.raises(DatasetError, match=r"fer2013\.csv: expected UTF-8 text, found UTF-16; save it as UTF-8"):
        FER2013(str(tmp_path)).dataset("train")


def test_parse_pixels() -> None:
    assert parse_pixels(ROW.encode()).tolist() == [i % 256 for i in range(2304)]
    parsed = parse_pixels(b"7 " + ROW[2:].encode())
    assert parsed.dtype == np.uint8
    assert parsed[0] == 7
    for text in (b"", b" ", f"{ROW} 1".encode(), ROW[:-4].encode(), ROW.replace(" ", "\t").encode(), b"9" * 30):
        with pytest.raises(ValueError, match="expected .*pixels .*found"):
            parse_pixels(text)
    with pytest.raises(ValueError, match="found '99999999999999999999'"):
        parse_pixels(b"9" * 20 + ROW[1:].encode())


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--data.root"):
        FER2013().dataset("train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DatasetError, match=r"(?s)no fer2013.csv .*expected.*fer2013.csv.*found.*train/"):
        FER2013(str(tmp_path)).dataset("train")
    with pytest.raises(DatasetError, match="no such folder"):
        FER2013(str(tmp_path / "nowhere")).dataset("train")
    data = FER2013(str(csv(tmp_path, f"3,{ROW},Training", f"3,{ROW},PublicTest")))
    with pytest.raises(DatasetError, match=r"PrivateTest rows for test, found 1 Training, 1 PublicTest; .*validate"):
        data.test_dataloader()
    with pytest.warns(UserWarning, match="Training has no faces of 6 emotions"):
        data.dataset("train")
    with pytest.raises(DatasetError, match="expected the columns emotion,pixels,Usage, found 'id,pixels'"):
        FER2013(str(csv(tmp_path, "3,4", header="id,pixels"))).dataset("train")
    with pytest.raises(DatasetError, match="found none"):
        FER2013(str(csv(tmp_path))).dataset("train")


def test_photos_to_predict(tmp_path: Path, drawn: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (40, 10)).save(tmp_path / "b.png")
    data = FER2013(images=str(tmp_path), num_workers=0, eval_batch_size=64)
    batches = list(data.predict_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(1, 3, 30, 20), (1, 3, 10, 40)]
    assert batches[0]["id"] == [str(tmp_path / "a.jpg")]
    with pytest.raises(DatasetError, match="--data.images"):
        FER2013(str(drawn)).predict_dataloader()


def accuracy(train: FER2013, shuffled: bool) -> float:
    """Accuracy of a small network on PublicTest."""
    torch.manual_seed(0)
    faces = train.faces
    images = F.avg_pool2d(faces.pixels[:, None] / 127.5 - 1, 2)
    labels = torch.from_numpy(faces.labels)
    learned, measured = (torch.from_numpy(train.indices(split)) for split in ("train", "val"))
    targets = labels[learned]
    targets = targets[torch.randperm(len(targets))] if shuffled else targets
    layers: list[nn.Module] = []
    for into, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(576, 7))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(8):
        for chosen in torch.randperm(len(learned)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(images[learned[chosen]]), targets[chosen]).backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        return (network(images[measured]).argmax(1) == labels[measured]).float().mean().item()


def test_the_emotion_can_be_learned(tmp_path: Path) -> None:
    """Chance is 1/7. With shuffled labels there is nothing to learn."""
    write_fer2013(str(tmp_path), train=50, val=25)
    data = FER2013(str(tmp_path))
    assert accuracy(data, shuffled=False) > 0.8
    assert accuracy(data, shuffled=True) < 0.3


def test_the_writer(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_fer2013(str(tmp_path / name), classes=2, train=2, val=1, seed=seed) == EMOTIONS[:2]
    a, b, c = ((tmp_path / name / "fer2013.csv").read_text() for name in "abc")
    assert a == b != c
    assert len(list((tmp_path / "a" / "photographs").iterdir())) == 6
    with pytest.raises(ValueError, match="size: expected 48, the side of FER2013's faces, found 64"):
        write_fer2013(str(tmp_path), size=64)
