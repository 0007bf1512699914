"""Yummly-28K: Min, Jiang, Sang, Wang, Liu and Herranz, "Being a Supercook: Joint Food Attributes and Multimodal Content
Modeling for Recipe Retrieval and Exploration", IEEE Transactions on Multimedia 2017. 27,638 recipes of 16 cuisines."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from datamodules.base import Split
from datamodules.classification.base import ClassificationData, Listing
from datamodules.folders import FolderDataset, PackedStrings, some
from errors import DatasetError, UserError

Attribute = Literal["cuisine", "course", "taste"]

MISSING = -100  # the label of an attribute that a recipe does not have
TASTES = ["Bitter", "Meaty", "Piquant", "Salty", "Sour", "Sweet"]
IMAGES, METADATA = "images27638", "metadata27638"
READERS = 16  # threads: on a cold disk a small file takes longer to come than to parse

# Words of an ingredient line that name no ingredient: amounts, containers, what is done to it, and what joins words.
_OTHER_WORDS = """
a about additional adjust all also an and any approx approximately as at bag ball beaten bite boiled boneless bottle
bowl box bunch c can canned carton chilled chopped chunk clove coarse coarsely cold cooked cored crosswise crumbled
crushed cube cubed cup cut dash deveined diagonally diced divided drained dried dry each envelope extra fat few fillet
fine finely firmly fl for free fresh freshly from frozen g gallon garnish good grated ground half halve halved handful
hard head heaping hot in inch into jar juiced kg kosher large lb leaf leave leftover lengthwise light lightly lite liter
litre low lukewarm matchstick medium melted mince minced ml more needed of optional or other ounce oz pack package
packed part peeled piece pinch pint pitted plus pound preferably prepared purpose quality quart quartered reduced
removed rinsed room rough roughly seeded separated serve serving shelled shredded sifted size skinless slice sliced
slightly small softened split sprig squeezed stalk stem stick strip t tablespoon taste tb tbsp teaspoon temperature
thawed the thick thickly thin thinly to toasted torn trimmed tsp uncooked unpeeled unsalted until use very virgin warm
washed well whole with yield you your
"""
NO_INGREDIENTS = frozenset(_OTHER_WORDS.split())


@dataclass(frozen=True)
class Recipe:
    """What is kept of a recipe's json.

    Attributes:
        cuisines, courses: all that it names.
        taste: the strongest of its flavours, None where it has none.
        words: its ingredients, None where it lists none.
    """

    cuisines: list[str]
    courses: list[str]
    taste: str | None
    words: frozenset[str] | None


class RecipeDataset(FolderDataset):
    """Images with ``labels`` {attribute: int, -100 where missing} and ``ingredients`` uint8 (V,), 255 where missing.

    Args:
        images: the images.
        attributes: {attribute: int64 (N,)}.
        ingredients: uint8 (N,V); None leaves them out.
    """

    def __init__(
        self, pictures: FolderDataset, attributes: dict[str, np.ndarray], ingredients: np.ndarray | None
    ) -> None:
        super().__init__(pictures.root, pictures.names, None, pictures.transform)
        self.attributes, self.ingredients = attributes, ingredients

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample["labels"] = {name: int(labels[index]) for name, labels in self.attributes.items()}
        if self.ingredients is not None:
            sample["ingredients"] = torch.from_numpy(self.ingredients[index].copy())
        return sample


class Yummly28K(ClassificationData):
    """Recipes of Yummly: an image each, with cuisine, course, taste and ingredients.

    ::

        Yummly28K/images27638/img00001.jpg          numbers 1 to 27638, or some of them
        Yummly28K/metadata27638/meta00001.json      {"attributes": {"cuisine": [...], "course": [...]},
                                                     "flavors": {"Salty": 0.3, ...} or {}, "ingredientLines": [...], ...}

    Images and metadata belong together by their number. A recipe with several cuisines (or courses) counts as the
    first of them; where ``cuisines`` are given, as the first of those. Its taste is the strongest of its flavours, the
    first by name of equals; one without flavours, or with zeros alone, has none. What a recipe lacks is no label.

    There is no official split: a recipe belongs to test, val or train by a hash of its number and ``split_seed``, so
    that it stays where it is when others come or go.

    Ingredients are words: the lines in lower case, without numbers, plural endings, amounts and what is done to a thing
    (`NO_INGREDIENTS`). The vocabulary are the words that the most recipes of train contain.

    Args:
        root: the folder ``Yummly28K``, or the one that it lies in. Only prediction can do without.
        ingredients: V, size of the vocabulary; 0 leaves ingredients out.
        cuisines, courses: the classes, in this order; None takes all that the metadata name, sorted.
        balance: the attribute whose classes ``sampling: balanced`` draws equally often.
        val_fraction, test_fraction: parts of the recipes, about; the rest is train.
        split_seed: another one splits otherwise.
        unpaired: what to do about an image without its json and a json without its image: ``error``, or ``skip``,
            which leaves it out and says how many.
        **kwargs: see `ClassificationData`.
    """

    def __init__(
        self,
        root: str | None = None,
        ingredients: int = 100,
        cuisines: list[str] | None = None,
        courses: list[str] | None = None,
        balance: Attribute = "cuisine",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        unpaired: Literal["error", "skip"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if ingredients < 0:
            raise UserError(f"ingredients: expected 0 or more, found {ingredients}")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            found = f"{val_fraction} and {test_fraction}"
            raise UserError(f"val_fraction, test_fraction: expected 0 or more, together less than 1, found {found}")
        self.vocabulary_size, self.given = ingredients, {"cuisine": cuisines, "course": courses, "taste": TASTES}
        self.balance, self.unpaired = balance, unpaired
        self.fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed

    # --- what is on disk ------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str:
        """The folder ``Yummly28K``."""
        root = self.root or ""
        inside = os.path.join(root, "Yummly28K")
        return root if os.path.isdir(os.path.join(root, METADATA)) or not os.path.isdir(inside) else inside

    @cached_property
    def pictures(self) -> dict[int, str]:
        """Names of the images by their numbers."""
        return self._numbered(IMAGES, r"img(\d+)\.jpe?g")

    @cached_property
    def metadata(self) -> dict[int, str]:
        """Names of the json files by their numbers."""
        return self._numbered(METADATA, r"meta(\d+)\.json")

    def _numbered(self, folder: str, pattern: str) -> dict[int, str]:
        path = os.path.join(self.folder, folder)
        if not os.path.isdir(path):
            raise self.refusal(f"there is no {folder}/")
        found: dict[int, str] = {}
        with os.scandir(path) as scan:
            matches = [(name, re.fullmatch(pattern, name, re.IGNORECASE)) for name in sorted(e.name for e in scan)]
        for name, match in matches:
            if match and (first := found.setdefault(int(match[1]), name)) != name:
                raise DatasetError(f"{path}: expected one file a number, found {first} and {name}: remove one")
        if not found:
            raise self.refusal(f"{folder}/ holds no {pattern[: pattern.index('(')]}<number>")
        return found

    @cached_property
    def recipes(self) -> dict[int, Recipe]:
        """The recipes that have an image, by their numbers, ascending."""
        numbers = sorted(self.pictures.keys() & self.metadata.keys())
        with ThreadPoolExecutor(READERS) as pool:
            paths = [os.path.join(self.folder, METADATA, self.metadata[n]) for n in numbers]
            return dict(zip(numbers, pool.map(read_recipe, paths), strict=True))

    def split_of(self, number: int) -> Split:
        """The split that a recipe belongs to."""
        digest = hashlib.blake2b(f"{self.split_seed}/{number}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        if place < self.fractions["test"]:
            return "test"
        return "val" if place < self.fractions["test"] + self.fractions["val"] else "train"

    @cached_property
    def _splits(self) -> dict[Split, list[int]]:
        splits: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
        for number in self.recipes:
            splits[self.split_of(number)].append(number)
        return splits

    # --- classes --------------------------------------------------------------------------------------------------

    @cached_property
    def attributes(self) -> dict[str, list[str]] | None:
        """{attribute: class names in label order}, of those that have classes; None when predicting without a root."""
        if self.classes is None:
            return None
        names = {name: given or self._named(name) for name, given in self.given.items()}
        return {name: classes for name, classes in names.items() if classes}

    def _named(self, attribute: str) -> list[str]:
        """All classes of an attribute that the metadata name, sorted."""
        lists = [recipe.cuisines if attribute == "cuisine" else recipe.courses for recipe in self.recipes.values()]
        return sorted({name for names in lists for name in names})

    @cached_property
    def ingredient_names(self) -> list[str] | None:
        """The vocabulary, most frequent first; None when predicting without a root."""
        if self.classes is None:
            return None
        counts = Counter(word for n in self._splits["train"] for word in self.recipes[n].words or ())
        return sorted(counts, key=lambda word: (-counts[word], word))[: self.vocabulary_size]

    def read_classes(self) -> list[str]:
        """Those of the attribute ``balance``."""
        if not self.recipes:
            raise self.refusal(self._unpaired()[0])
        return self.given[self.balance] or self._named(self.balance)

    @property
    def class_names(self) -> None:
        """None: an image has several labels; see ``attributes``."""
        return None

    def attribute_labels(self, split: Split) -> dict[str, np.ndarray]:
        """{attribute: int64 (N,)}, -100 where missing, in the dataset's order."""
        return {name: self._label(name, classes, split) for name, classes in (self.attributes or {}).items()}

    def _label(self, attribute: str, classes: list[str], split: Split) -> np.ndarray:
        number = {name: i for i, name in enumerate(classes)}
        named = [self._names_of(attribute, self.recipes[n]) for n in self._splits[split]]
        return np.array([next((number[n] for n in names if n in number), MISSING) for names in named], np.int64)

    @staticmethod
    def _names_of(attribute: str, recipe: Recipe) -> list[str]:
        if attribute == "taste":
            return [recipe.taste] if recipe.taste else []
        return recipe.cuisines if attribute == "cuisine" else recipe.courses

    def _multi_hot(self, split: Split) -> np.ndarray:
        """uint8 (N,V)."""
        column = {word: i for i, word in enumerate(self.ingredient_names or ())}
        table = np.zeros((len(self._splits[split]), len(column)), np.uint8)
        for row, number in zip(table, self._splits[split], strict=True):
            words = self.recipes[number].words
            if words is None:
                row[:] = 255
            else:
                row[[column[word] for word in words if word in column]] = 1
        return table

    # --- splits ---------------------------------------------------------------------------------------------------

    def title(self, split: Split) -> str:
        return split

    def absent(self, split: Split) -> str:
        return "" if split == "train" or self.fractions[split] else f"{split}_fraction is 0, so there is nothing"

    def read_listing(self, split: Split) -> Listing:
        labels = self._label(self.balance, self.classes or [], split)
        classes = [*(self.classes or []), *([f"(no {self.balance})"] if (labels < 0).any() else [])]
        names = [f"{IMAGES}/{self.pictures[n]}" for n in self._splits[split]]
        labels = np.where(labels < 0, len(classes) - 1, labels).astype(np.int32)
        missing: list[str] = []
        if self.unpaired == "error":
            missing += [f"{IMAGES}/img{n:05d}.jpg" for n in sorted(self.metadata.keys() - self.pictures.keys())]
            missing += [f"{METADATA}/meta{n:05d}.json" for n in sorted(self.pictures.keys() - self.metadata.keys())]
        return Listing(classes, PackedStrings(names), labels, missing=missing)

    def dataset(self, split: Split) -> FolderDataset:
        """The images of one split. See `RecipeDataset`; for ``predict`` there are no labels.

        Raises:
            DatasetError: see `problems`; for ``predict``, there are no images.
        """
        pictures = super().dataset(split)
        if split == "predict":
            return pictures
        ingredients = self._multi_hot(split) if self.ingredient_names else None
        return RecipeDataset(pictures, self.attribute_labels(split), ingredients)

    def problems(self, split: Split) -> list[str]:
        """As ever, and what has no partner, of all splits."""
        lines = self._unpaired() if self.unpaired == "error" else []
        advice = "complete the set, or leave out what is alone: --data.unpaired skip"
        return [f"{line}: {advice}" for line in lines] or super().problems(split)

    def _unpaired(self) -> list[str]:
        """A line on the images without metadata, and one on the metadata without an image."""
        lines = []
        for have, other, kinds, lacks in (
            (self.pictures, self.metadata, ("picture", "pictures"), "json"),
            (self.metadata, self.pictures, ("json", "jsons"), "picture"),
        ):
            if alone := [have[number] for number in sorted(have.keys() - other.keys())]:
                lines.append(f"{some(alone, *kinds)} without a {lacks} of that number")
        return lines

    def oddities(self, split: Split) -> list[str]:
        """As ever, and how many recipes, of all splits, lack a label or name several."""
        recipes, lines = self.recipes.values(), super().oddities(split)
        lacking, several = [], []
        for name in self.given:
            known, named = (
                set((self.attributes or {}).get(name, ())),
                [self._names_of(name, recipe) for recipe in recipes],
            )
            without = sum(known.isdisjoint(names) for names in named)
            lacking += [f"{without} without {'flavours' if name == 'taste' else name}"] if without else []
            many = sum(len(known.intersection(names)) > 1 for names in named)
            several += [f"{many} with several {name}s"] if many else []
        if self.vocabulary_size and (without := sum(recipe.words is None for recipe in recipes)):
            lacking.append(f"{without} without ingredients")
        if lacking or several:
            told = [
                ", ".join(part) + what
                for part, what in ((lacking, " (no label)"), (several, " (the first counts)"))
                if part
            ]
            lines.append(f"of {len(recipes)} recipes {', '.join(told)}")
        if self.unpaired == "skip":
            lines += [f"left out {line}" for line in self._unpaired()]
        return lines

    def expected(self) -> str:
        return f"  {self.folder}/\n    {IMAGES}/img00001.jpg, ...\n    {METADATA}/meta00001.json, ..."


# --- metadata -----------------------------------------------------------------------------------------------------


def read_recipe(path: str) -> Recipe:
    """Reads a recipe's json.

    Raises:
        DatasetError: it is not valid json, or not a recipe's.
    """
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: expected a recipe's json, found invalid json ({error}): get it anew") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected a recipe's json, an object, found {str(content)[:40]}")
    attributes = content.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise DatasetError(f"{path}: attributes: expected an object, found {str(attributes)[:40]}")
    lines = _strings(path, content, "ingredientLines")
    return Recipe(
        cuisines=_strings(path, attributes, "cuisine"),
        courses=_strings(path, attributes, "course"),
        taste=strongest(path, content.get("flavors")),
        words=ingredient_words(lines) if lines else None,
    )


def _strings(path: str, content: dict[str, Any], key: str) -> list[str]:
    """The strings under a key, stripped, none of them empty or twice; one alone counts as a list."""
    values = content.get(key) or []
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DatasetError(f"{path}: {key}: expected a list of strings, found {str(values)[:40]}")
    return list(dict.fromkeys(value.strip() for value in values if value.strip()))


def strongest(path: str, flavors: Any) -> str | None:
    """The flavour with the largest value, whatever the case of its name; the first by name of equals.

    None where there are no flavours, or where all are 0.

    Raises:
        DatasetError: not an object of Yummly's six flavours and numbers; the message names ``path``.
    """
    known = {name.lower(): name for name in TASTES}
    expected = f"{path}: flavors: expected numbers for {', '.join(TASTES)}"
    if flavors is not None and not isinstance(flavors, dict):
        raise DatasetError(f"{expected}, found {str(flavors)[:40]}")
    values = {}
    for key, value in (flavors or {}).items():
        if key.lower() not in known or isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise DatasetError(f"{expected}, found {key}: {str(value)[:40]}")
        values[known[key.lower()]] = value or 0.0
    best = max(sorted(values), key=lambda name: values[name], default=None)
    return best if best is not None and values[best] > 0 else None


def ingredient_words(lines: list[str]) -> frozenset[str]:
    """The words of ingredient lines that may name an ingredient: ``2 large eggs, beaten`` gives ``egg``.

    A plural loses its ending: berries, tomatoes, eggs become berry, tomato, egg; hummus and watercress stay.
    """
    words = {_singular(word) for line in lines for word in re.findall(r"[^\W\d_]+", line.lower())}
    return frozenset(word for word in words if len(word) > 1 and word not in NO_INGREDIENTS)


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("oes"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us")) else word
