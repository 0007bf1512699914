"""Help of the command line: no option is blank, and classes are listed by case study."""

from __future__ import annotations

from typing import Any

import pytest

import cli.parser
from cli.messages import CASE_STUDIES, FriendlyParser, class_names
from tests.command import refusal

cli.parser.register_classes()


def blank_options(parser: Any) -> list[str]:
    """Return the options of a parser that have no help."""
    hidden = ("help", "print_config", "print_shtab")
    return [action.dest for action in parser._actions if action.dest not in hidden and not (action.help or "").strip()]


def class_of(slot: str, name: str) -> type:
    base = cli.messages._bases(slot)[0]
    return next(cls for cls in cli.messages._subclasses(base) if cls.__name__ == name)


@pytest.mark.parametrize("slot", ["model", "data"])
def test_every_option_of_every_class_has_help(slot: str) -> None:
    blank = []
    for name in class_names(slot):
        parser = FriendlyParser(exit_on_error=False)
        parser.add_class_arguments(class_of(slot, name), slot)
        blank += [f"{name}: {option}" for option in blank_options(parser)]
    assert blank == []


@pytest.mark.parametrize("name", ["AdaIN", "StylePrediction", "NeuralStyle"])
def test_systems_that_take_pixels_in_0_to_1_have_no_mean_and_std(name: str) -> None:
    parser = FriendlyParser(exit_on_error=False)
    parser.add_class_arguments(class_of("model", name), "model")
    options = {action.dest for action in parser._actions}
    assert "model.schedule" in options
    assert not options & {"model.mean", "model.std"}


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_option_of_a_command_has_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def stop(self: cli.parser.VisionCLI, parser: Any, args: Any) -> None:
        raise Parsed(self)

    monkeypatch.setattr(cli.parser.VisionCLI, "parse_arguments", stop)
    with pytest.raises(Parsed) as caught:
        cli.parser.VisionCLI([command])
    assert blank_options(caught.value.args[0]._subcommand_parsers[command]) == []


@pytest.mark.parametrize(("slot", "some"), [("model", ("SSD", "DeepLabV3", "AdaIN")), ("data", ("ImageNet", "MPII"))])
def test_help_without_a_name_lists_the_classes(
    slot: str, some: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.parser.run(["fit", f"--{slot}.help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in CASE_STUDIES] == list(CASE_STUDIES)
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(names) == class_names(slot)
    assert set(some) <= set(names)
    assert all(len(line.split()) > 1 for line in lines if line.startswith("  "))


def test_a_wrong_name_suggests_only_its_own_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for slot, name, other in (("model", "VOCDetection", "VOCSegmentation"), ("data", "SSD", "RCNN")):
        line = refusal(["fit", f"--{slot}.help", name], capsys)
        assert f"--{slot}: expected" in line
        assert other not in line
        line = refusal(["fit", "--model", "SSD", "--data", "VOCDetection", f"--{slot}", name], capsys)
        assert f"--{slot}: expected" in line
        assert other not in line
    assert "did you mean SSD?" in refusal(["fit", "--model.help", "SSDD"], capsys)
