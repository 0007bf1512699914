"""Where the cells of a feature map lie in the image: the centers of their receptive fields."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

#: Stride in pixels, and the position of cell 0: cell i is centered on pixel ``stride * i + start``.
Centers = tuple[int, float]


def cell_centers(network: fx.GraphModule) -> dict[str, Centers | None]:
    """Return stride and start of each output of a traced network, along one side of the image.

    Convolutions and pooling layers move the centers. All other operations keep them. If an operation combines maps of
    several strides, such as squeeze-and-excitation, the finest map counts.

    Args:
        network: the result of torchvision's ``create_feature_extractor``.

    Returns:
        (stride, start) in pixels by the name of the output, None if it does not come from the image.
    """
    centers: dict[fx.Node, Centers | None] = {}
    outputs: dict[str, fx.Node] = {}
    for node in network.graph.nodes:
        if node.op == "output":
            outputs = node.args[0]
            continue
        if node.op == "placeholder":
            centers[node] = (1, 0.0)
            continue
        found = [one for source in node.all_input_nodes if (one := centers.get(source)) is not None]
        centers[node] = min(found) if found else None
        if node.op == "call_module" and found:
            centers[node] = _after(network.get_submodule(node.target), *min(found))
    return {name: centers[node] for name, node in outputs.items()}


def _after(layer: nn.Module, stride: int, start: float) -> Centers | None:
    """Return the centers after a layer; None after global pooling, whose cells have no position."""
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return None
    if isinstance(layer, nn.Sequential):  # torchvision's Conv2dNormActivation is not traced
        found: Centers | None = (stride, start)
        for part in layer:
            found = None if found is None else _after(part, *found)
        return found
    if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        return stride, start
    sides: list[Any] = [layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1)]
    kernel, step, padding, dilation = (side[0] if isinstance(side, tuple) else side for side in sides)
    return stride * step, start + stride * (dilation * (kernel - 1) / 2 - padding)
