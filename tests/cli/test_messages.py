"""Answers to mistakes on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import QUICK, ROOT, TINY, refusal


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py', '--help']\nimport train\n"
    code += "try: train.main()\nfinally: assert not {'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("fit", "validate", "test", "predict", "--config", "--resume"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("args", "found", "nearest"),
    [
        (["--trainer.max_epoch", "3"], "trainer.max_epoch", "trainer.max_epochs"),
        (["--trainer.acumulate_grad_batches=3"], "trainer.acumulate_grad_batches", "trainer.accumulate_grad_batches"),
        (["--model", "ImageClasifier"], "ImageClasifier", "ImageClassifier"),
        (["--data", "ImageNt"], "ImageNt", "ImageNet"),
        (["--model.bakbone", "vgg16"], "bakbone", "backbone"),
        (["--data.batchsize", "3"], "batchsize", "batch_size"),
        (["--model.optimizer", "AdmW"], "AdmW", "AdamW"),
        (["--model.optimizer.momentm", "0.1"], "momentm", "momentum"),
        (["--model.schedule", "Cosin"], "Cosin", "Cosine"),
        (["--trainer.max_epochs", "many"], "many", "int or null"),
        (["--data.batch_size", "many"], "many", "int"),
        (["--config", "nowhere.yaml"], "nowhere.yaml", "no such file"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    args: list[str], found: str, nearest: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(["fit", *TINY, "--data.root", str(data), *args], capsys)
    assert found in line
    assert nearest in line
    assert len(line) < 300


def test_a_mistake_in_yaml(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, found, nearest in (
        ("trainer: {max_epoch: 3}", "trainer.max_epoch", "trainer.max_epochs"),
        ("modle: {class_path: ImageClassifier}", "modle", "model"),
        ("model: {class_path: ImageClassifier, init_args: {base_chanels: 4}}", "base_chanels", "base_channels"),
        ("trainer: [3", "YAML", "line 1"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        line = refusal(["fit", *TINY, "--data.root", str(data), "--config", "bad.yaml"], capsys)
        assert found in line
        assert nearest in line


def test_a_command_mistyped(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean fit?" in refusal(["fti"], capsys)


def test_missing_parts(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data: expected a class, found none" in refusal(["fit", "--model", "ImageClassifier"], capsys)
    assert "--model: expected a class, found none" in refusal(
        ["fit", "--data", "ImageNet", "--data.root", str(data)], capsys
    )
    assert "--data.root" in refusal(["fit", "--model", "ImageClassifier", "--data", "ImageNet"], capsys)
    assert "ImageFolder" in refusal(["fit", *TINY, *QUICK, "--data.root", str(tmp_path / "nothing")], capsys)
