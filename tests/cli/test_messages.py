"""Answers to mistakes on the command line."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "class Hands:\n    x = missing_name\n",
            "NameError: name 'missing_name' is not defined \\(.*own_module.py:2\\)",
        ),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' \\(.*own_module.py:1\\)"),
        ("class Hands(\n", "SyntaxError: .*own_module.py:1"),
        ("class Hand: pass\n", "expected a class of .*own_module.py, found no Hands; did you mean Hand"),
        (
            "class Hands: pass\n",
            "expected a Lightning(DataModule|Module) or null, found own_module.Hands, which is not one",
        ),
    ],
)
@pytest.mark.parametrize("slot", ["data", "model"])
def test_the_error_of_an_own_module_is_shown(
    source: str,
    expected: str,
    slot: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    others = {"data": ["--model", "EmotionClassifier"], "model": ["--data", "FER2013"]}
    line = refusal(["fit", f"--{slot}", "own_module.Hands", *others[slot]], capsys)
    assert line.startswith(f"error: --{slot}: ")
    assert re.search(expected, line)


def test_a_wrong_number_inside_a_class_names_option_type_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.schedule", "Cosine", "--model.schedule.warmup_steps", "abc"]
    line = refusal(["fit", "--model", "EmotionClassifier", "--data", "FER2013", *options], capsys)
    assert line.strip() == "error: --model.schedule.warmup_steps: expected int, found abc"
