"""The interface of a prediction kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from visualization.drawing import fit_square, resize_long_side
from visualization.samples import Sample

Size = tuple[int, int]  # (width, height) in pixels
Scale = tuple[float, float]  # factors of x and y
Table = tuple[list[str], list[list[Any]]]  # columns and rows


class PredictionView:
    """Recognizes, draws and records one kind of prediction.

    A new kind is a subclass in its own file and an entry in ``visualization.views.VIEWS``. Contact sheets, annotated
    images, JSON, CSV and tables in W&B follow from it. In all methods, ``prediction`` is what a system's ``predict``
    returns for one image, and ``names`` are the module's: a list of class or joint names, ``{attribute: names}``, or
    None for ``class <index>``.
    """

    #: Key of `record` that identifies the kind in ``predictions.json``.
    key: str
    #: Longer side of the image on a contact sheet, in pixels.
    tile_size = 384
    #: Whether images on a contact sheet are fitted into squares.
    square_tiles = False

    def matches(self, prediction: Any) -> bool:
        """Return whether the prediction is of this kind; exactly one view of ``VIEWS`` matches."""
        raise NotImplementedError

    def draw(
        self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any, size: Size | None = None
    ) -> Image.Image:
        """Draw the prediction on a copy of the image, and the ground truth if it is known.

        Args:
            image: RGB, of any size.
            prediction: of this kind.
            ground_truth: entries of the batch for this image (see ``datamodules/base.py``), or an empty dict.
            names: see the class.
            size: (width, height) of the tensor whose pixels the coordinates refer to; None: those of ``image``.
        """
        raise NotImplementedError

    def record(self, prediction: Any, names: Any, scale: Scale) -> dict[str, Any]:
        """Return the JSON record.

        Args:
            prediction: of this kind.
            names: see the class.
            scale: factors of x and y from the pixels of the network's input to those of the image file.
        """
        raise NotImplementedError

    def columns(self, record: dict[str, Any]) -> list[str]:
        """Return the columns of ``predictions.csv`` without ``file``."""
        raise NotImplementedError

    def rows(self, record: dict[str, Any]) -> list[list[Any]]:
        """Return the rows of ``predictions.csv`` for one record."""
        raise NotImplementedError

    def table(self, samples: Sequence[Sample], names: Any) -> Table | None:
        """Return columns and rows of the W&B table of an evaluation; cells may be PIL images."""
        return None

    def mask(self, prediction: Any) -> Tensor | None:
        """Return the ids that are saved as a PNG, integers (H, W); None if the kind has no mask."""
        return None

    def extra_figures(self, samples: Sequence[Sample], names: Any) -> dict[str, Image.Image]:
        """Return further figures of an evaluation by name."""
        return {}

    def tile(self, image: Image.Image, prediction: Any, ground_truth: dict[str, Any], names: Any) -> Image.Image:
        """Draw a tile of a contact sheet."""
        resize = fit_square if self.square_tiles else resize_long_side
        return self.draw(resize(image, self.tile_size), prediction, ground_truth, names, image.size)

    def annotate(self, image: Image.Image, prediction: Any, names: Any, size: Size, scale: Scale) -> Image.Image:
        """Draw the prediction on the image file, whose ground truth is unknown.

        Args:
            image: the file, RGB, possibly reduced.
            prediction: as `to_original` returns it.
            names: see the class.
            size: (width, height) of the network's input.
            scale: see `record`.
        """
        return self.draw(image, prediction, {}, names, size)

    def to_original(self, prediction: Any, ground_truth: dict[str, Any], scale: Scale) -> Any:
        """Move coordinates to the pixels of the image file, for kinds whose input is a crop of it."""
        return prediction

    def reduce(self, prediction: Any) -> Any:
        """Drop what is not drawn; predictions stay in memory until the end of the evaluation."""
        return prediction
