"""Every constructor option of every system has an effect, or is refused where it has none."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import lightning_modules
from cli.messages import class_names
from errors import UserError

lightning_modules.import_all()

#: Options whose effect is not in the system itself, with the reason.
ELSEWHERE = {
    "class_names": "names in tables and figures, read by the callbacks",
    "ingredient_names": "names in tables and figures; their number is the size of a layer",
    "joint_names": "names of the metrics; their number is the size of a layer",
    "monitor": "read by the checkpoint callback",
}
#: Options that make a small system, without weights to download.
SMALL: dict[str, dict[str, Any]] = {
    name: {"weights": "random"}
    for name in ("AdaIN", "FastStyle", "StylePrediction", "InversionNetwork", "FeatureInversion", "NeuralStyle")
} | {"TextureSynthesis": {"weights": "random"}, "AttributeClassifier": {"attributes": {"cuisine": ["Greek", "Thai"]}}}
#: The networks that each system can have: every option is tried with each of them.
CONTEXTS: dict[str, list[dict[str, Any]]] = {
    "AttributeClassifier": [{"backbone": "resnet20_cifar"}, {"backbone": "resnet50"}],
    "ImageClassifier": [
        {"backbone": name} for name in ("resnet20_cifar", "resnet18", "vgg16", "alexnet", "googlenet", "inception_v3")
    ],
    "FastRCNN": [{"backbone": "vgg16", "batch_norm": True}, {"backbone": "resnet50"}, {"backbone": "resnet50_fpn"}],
    "FasterRCNN": [{"backbone": "vgg16", "batch_norm": True}, {"backbone": "resnet50"}],
    "RPN": [{"backbone": "vgg16", "batch_norm": True}, {"backbone": "resnet50"}],
    "MaskRCNN": [{"backbone": "vgg16", "anchor_sizes": (128, 256, 512)}, {"backbone": "resnet50_fpn"}],
    "KeypointRCNN": [{"backbone": "vgg16", "anchor_sizes": (128, 256, 512)}, {"backbone": "resnet50_fpn"}],
    "RCNN": [{"backbone": name} for name in ("alexnet", "vgg16", "small")],
    "YOLOv1": [{"backbone": name} for name in ("darknet", "resnet50")],
    "OverFeat": [{"variant": name} for name in ("fast", "accurate", "small")],
    "SSD": [{"variant": name} for name in ("ssd300", "ssd512")],
    "FCN": [{"backbone": name} for name in ("vgg16", "resnet18", "mobilenet_v2")],
    "DeepLab": [{"variant": name} for name in ("largefov", "aspp", "resnet101")],
    "DeepLabV3": [{"backbone": "resnet18", "multi_grid": (1, 2)}, {"backbone": "resnet50"}],
    "PatchClassifier": [{"backbone": name} for name in ("small", "vgg16")],
    "DeepPose": [{"backbone": name} for name in ("alexnet_2014", "resnet18", "vgg11", "mobilenet_v2")],
    "OrientationRegressor": [{"backbone": name} for name in ("small", "resnet20_cifar", "resnet18")],
}
#: Options of the network's structure, which must change it; a value that is only stored does not count.
STRUCTURAL = {
    "base_channels": 8,
    "batch_norm": True,
    "batch_norm_momentum": 0.5,
    "channels": 64,
    "class_specific": False,
    "conv1_padding": 1,
    "depth": 2,
    "dropout": 0.125,
    "fc6_kernel": 5,
    "freeze_backbone": True,
    "freeze_batch_norm": True,
    "grid_size": 5,
    "hidden_units": 32,
    "num_classes": 3,
    "num_stacks": 2,
    "output_stride": 8,
    "stride": 8,
    "stride_in_1x1": False,
    "width_multiplier": 0.5,
}


#: Other values, where those of `STRUCTURAL` are the default or of another kind; None where it is no layer's option.
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "DeconvNet": {"batch_norm": False},
    "EncoderDecoder": {"channels": (8, 16)},
    "PatchClassifier": {"stride": None},  # step of the windows in prediction
}


def system(name: str) -> type[pl.LightningModule]:
    found = [cls for cls in _subclasses(pl.LightningModule) if cls.__name__ == name]
    return next(cls for cls in found if cls.__module__.startswith("lightning_modules"))


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


@cache
def options_of(cls: type) -> list[str]:
    """Return the options that the command line offers for a class, those of its base classes included."""
    names = ArgumentParser().add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    return list(dict.fromkeys(name.split(".")[0] for name in names))


# --- every option is used -----------------------------------------------------------------------------------------


def is_used(cls: type, option: str) -> bool:
    """Whether some constructor uses the option other than by storing it, or a method reads what it was stored as."""
    ours = [c for c in cls.__mro__ if c.__module__.startswith(("lightning_modules.", "tests."))]
    trees = [ast.parse(textwrap.dedent(inspect.getsource(c))) for c in ours]
    stored: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            if option not in [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]:
                continue
            for statement in node.body:
                names, attributes = assigned(statement, option)
                stored |= attributes
                if any(isinstance(n, ast.Name) and n.id == option for n in names):
                    return True
    reads = (
        n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    )
    return any(n.attr in stored for n in reads)


def assigned(statement: ast.stmt, option: str) -> tuple[list[ast.AST], set[str]]:
    """Return the nodes of a statement that count as a use, and the attributes that only store the option."""
    if not isinstance(statement, ast.Assign):
        return list(ast.walk(statement)), set()
    target, value = statement.targets[0], statement.value
    pairs = (
        zip(target.elts, value.elts, strict=True)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        else [(target, value)]
    )
    uses: list[ast.AST] = []
    stored: set[str] = set()
    for to, of in pairs:
        if isinstance(to, ast.Attribute) and any(isinstance(n, ast.Name) and n.id == option for n in ast.walk(of)):
            stored.add(to.attr)
        else:
            uses += ast.walk(of)
    return uses, stored


@pytest.mark.parametrize("name", class_names("model"))
def test_every_option_is_used(name: str) -> None:
    cls = system(name)
    unused = [option for option in options_of(cls) if option not in ELSEWHERE and not is_used(cls, option)]
    assert unused == []


def test_an_option_that_is_only_stored_is_found() -> None:
    assert not is_used(OnlyStores, "ignored")
    assert is_used(OnlyStores, "read")
    assert is_used(OnlyStores, "passed")


class OnlyStores(nn.Module):
    def __init__(self, ignored: int, read: int, passed: int) -> None:
        super().__init__()
        self.ignored, self.read = ignored, read
        self.layer = nn.Linear(passed, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.read


# --- every option of the structure changes it, with every network ----------------------------------------------------


def structure(module: Any) -> Any:
    """Describe a system's layers, shapes, frozen parts and parameter groups."""
    module.train()
    layers = [
        (name, type(layer).__name__, layer.extra_repr(), layer.training, getattr(layer, "subsampling", None))
        for name, layer in module.named_modules()
    ]
    shapes = [(name, tuple(value.shape)) for name, value in module.state_dict().items()]
    trained = [(name, p.requires_grad) for name, p in module.named_parameters()]
    try:
        groups = [{**group, "params": len(group["params"])} for group in module.parameter_groups()]
    except (AttributeError, TypeError):  # an optimized image does not exist before the run
        groups = []
    constants = [tuple(c.value.shape) for c in module.modules() if hasattr(c, "value") and isinstance(c.value, Tensor)]
    return layers, shapes, trained, groups, constants


CASES = [(name, context) for name in class_names("model") for context in CONTEXTS.get(name, [{}])]


@pytest.mark.parametrize(("name", "context"), CASES, ids=[f"{n}-{'-'.join(map(str, c.values()))}" for n, c in CASES])
def test_every_option_of_the_structure_changes_it_or_is_refused(name: str, context: dict[str, Any]) -> None:
    cls: Any = system(name)
    options = {**SMALL.get(name, {}), **context}
    values = {**STRUCTURAL, **OTHER_VALUES.get(name, {})}
    offered = [option for option in options_of(cls) if values.get(option) is not None]
    tried = {option: values[option] for option in offered if option not in options}
    if not tried:
        pytest.skip("no options of the structure")
    with torch.device("meta"):
        torch.manual_seed(0)
        reference = structure(cls(**options))
        without_effect = []
        for option, value in tried.items():
            try:
                changed = structure(cls(**{**options, option: value}))
            except UserError:
                continue
            if changed == reference:
                without_effect.append(option)
    assert without_effect == []
