"""Yummly-28K: 27,638 recipes of 16 cuisines, with an image, courses, flavors and ingredients.

Min, Jiang, Sang, Wang, Liu and Herranz, "Being a Supercook: Joint Food Attributes and Multimodal Content Modeling for
Recipe Retrieval and Exploration", IEEE Transactions on Multimedia 2017.
"""

from __future__ import annotations

import hashlib
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
from datamodules.folders import require_different_names, summarize_names
from datamodules.image_dataset import ImageDataset, PackedStrings
from datamodules.text import load_json
from errors import DatasetError, UserError

Attribute = Literal["cuisine", "course", "taste"]

MISSING = -100  # label of an attribute that a recipe lacks
TASTES = ["Bitter", "Meaty", "Piquant", "Salty", "Sour", "Sweet"]
IMAGES, METADATA = "images27638", "metadata27638"
READERS = 16  # threads: on a cold disk, reading a small file takes longer than parsing it

# Words of an ingredient line that name no ingredient: amounts, containers, preparations and function words.
_NON_INGREDIENTS = """
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
NON_INGREDIENTS = frozenset(_NON_INGREDIENTS.split())

# Words of recipes that the rules of `singular` would spoil: singulars in -che, -ie or -sse, and words in -s.
_SINGULARS = {
    **{f"{word}s": word for word in ["bouillabaisse", "brioche", "ceviche", "ganache", "mousse", "quiche"]},
    **{f"{word}s": word for word in ["brownie", "calorie", "cookie", "hoagie", "smoothie", "veggie"]},
    **{word: word for word in ["anis", "cassis", "gras", "haggis", "molasses", "pastis", "schnapps"]},
    "leaves": "leaf",
    "loaves": "loaf",
    "halves": "half",
}


@dataclass(frozen=True)
class Recipe:
    """The used fields of a recipe's JSON file.

    Attributes:
        cuisines: all cuisines of the recipe.
        courses: all courses of the recipe.
        taste: the strongest flavor; None without flavors.
        words: the ingredients; None without a list of them.
    """

    cuisines: list[str]
    courses: list[str]
    taste: str | None
    words: frozenset[str] | None


class RecipeDataset(ImageDataset):
    """Images with ``labels`` {attribute: int, -100 if missing} and ``ingredients`` uint8 (V,), 255 if missing.

    Args:
        images: the images.
        attributes: {attribute: int64 (N,)}.
        ingredients: uint8 (N, V); None omits them.
    """

    def __init__(self, images: ImageDataset, attributes: dict[str, np.ndarray], ingredients: np.ndarray | None) -> None:
        super().__init__(images.names, images.transform, images.root)
        self.attributes, self.ingredients = attributes, ingredients

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample["labels"] = {name: int(labels[index]) for name, labels in self.attributes.items()}
        if self.ingredients is not None:
            sample["ingredients"] = torch.from_numpy(self.ingredients[index].copy())
        return sample


class Yummly28K(ClassificationData):
    """Recipes of Yummly-28K: one image each, with cuisine, course, taste and ingredients.

    ::

        Yummly28K/images27638/img00001.jpg          numbers 1 to 27638, or some of them
        Yummly28K/metadata27638/meta00001.json      {"attributes": {"cuisine": [...], "course": [...]},
                                                     "flavors": {"Salty": 0.3, ...} or {}, "ingredientLines": [...]}

    Images and JSON files are paired by number. Of several cuisines (or courses) the first is the label, or the first in
    ``cuisines`` if that is given. The taste is the strongest flavor, the first by name on ties. A recipe without
    flavors, or with zeros only, has no taste label.

    There is no official split. A hash of a recipe's number and ``split_seed`` selects its split, so that the split does
    not depend on the other recipes.

    Ingredients are words: the lines in lower case without numbers, plural endings, amounts and preparations
    (`NON_INGREDIENTS`). The vocabulary contains the words that occur in most training recipes.

    Args:
        root: the folder ``Yummly28K`` or its parent. Optional for prediction.
        vocabulary_size: number of ingredients V; 0 omits ingredients.
        cuisines: the cuisine classes, in this order; null uses all cuisines of the metadata, sorted.
        courses: the course classes, in this order; null uses all courses of the metadata, sorted.
        balance: the attribute whose classes ``sampling: balanced`` draws equally often.
        val_fraction: approximate fraction of recipes for validation.
        test_fraction: approximate fraction of recipes for testing. The rest is for training.
        split_seed: another seed gives another split.
        unpaired: what to do with an image without JSON file or vice versa: ``error``, or ``skip``, which ignores and
            counts it.
        **kwargs: see `ClassificationData`.
    """

    def __init__(
        self,
        root: str | None = None,
        vocabulary_size: int = 100,
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
        if vocabulary_size < 0:
            raise UserError(f"vocabulary_size: expected 0 or more, found {vocabulary_size}")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            found = f"{val_fraction} and {test_fraction}"
            raise UserError(f"val_fraction, test_fraction: expected 0 or more, together less than 1, found {found}")
        for option, names in (("cuisines", cuisines), ("courses", courses)):
            if names is not None:
                require_different_names(option, names)
        self.vocabulary_size = vocabulary_size
        self.given_classes = {"cuisine": cuisines, "course": courses, "taste": TASTES}
        self.balance, self.unpaired = balance, unpaired
        self.fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed

    # --- files -------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str:
        """The folder ``Yummly28K``."""
        root = self.root or ""
        inside = os.path.join(root, "Yummly28K")
        return root if os.path.isdir(os.path.join(root, METADATA)) or not os.path.isdir(inside) else inside

    @cached_property
    def image_files(self) -> dict[int, str]:
        """File names of the images by number."""
        return self._numbered(IMAGES, r"img(\d+)\.jpe?g")

    @cached_property
    def json_files(self) -> dict[int, str]:
        """File names of the metadata by number."""
        return self._numbered(METADATA, r"meta(\d+)\.json")

    def _numbered(self, folder: str, pattern: str) -> dict[int, str]:
        path = os.path.join(self.folder, folder)
        if not os.path.isdir(path):
            raise self.layout_error(f"there is no {folder}/")
        found: dict[int, str] = {}
        with os.scandir(path) as scan:
            matches = [(name, re.fullmatch(pattern, name, re.IGNORECASE)) for name in sorted(e.name for e in scan)]
        for name, match in matches:
            if match and (first := found.setdefault(int(match[1]), name)) != name:
                raise DatasetError(f"{path}: expected one file per number, found {first} and {name}; remove one")
        if not found:
            raise self.layout_error(f"{folder}/ contains no {pattern[: pattern.index('(')]}<number>")
        return found

    @cached_property
    def recipes(self) -> dict[int, Recipe]:
        """The recipes with an image, by ascending number."""
        numbers = sorted(self.image_files.keys() & self.json_files.keys())
        with ThreadPoolExecutor(READERS) as pool:
            paths = [os.path.join(self.folder, METADATA, self.json_files[n]) for n in numbers]
            return dict(zip(numbers, pool.map(read_recipe, paths), strict=True))

    def split_of(self, number: int) -> Split:
        """Return the split of a recipe."""
        digest = hashlib.blake2b(f"{self.split_seed}/{number}".encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        if position < self.fractions["test"]:
            return "test"
        return "val" if position < self.fractions["test"] + self.fractions["val"] else "train"

    @cached_property
    def _splits(self) -> dict[Split, list[int]]:
        splits: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
        for number in self.recipes:
            splits[self.split_of(number)].append(number)
        return splits

    # --- classes --------------------------------------------------------------------------------------------------

    @cached_property
    def attributes(self) -> dict[str, list[str]] | None:
        """{attribute: class names in label order}, without empty ones; None for prediction without ``root``."""
        if self.classes is None:
            return None
        names = {name: given or self._all_classes(name) for name, given in self.given_classes.items()}
        return {name: classes for name, classes in names.items() if classes}

    def _all_classes(self, attribute: str) -> list[str]:
        """Return all classes of an attribute in the metadata, sorted."""
        return sorted({name for recipe in self.recipes.values() for name in _recipe_classes(recipe, attribute)})

    @cached_property
    def ingredient_names(self) -> list[str] | None:
        """The vocabulary, most frequent first; None for prediction without ``root``."""
        if self.classes is None:
            return None
        counts = Counter(word for n in self._splits["train"] for word in self.recipes[n].words or ())
        return sorted(counts, key=lambda word: (-counts[word], word))[: self.vocabulary_size]

    def read_classes(self) -> list[str]:
        """Return the classes of the attribute ``balance``."""
        if not self.recipes:
            raise self.layout_error(self._unpaired()[0])
        return self.given_classes[self.balance] or self._all_classes(self.balance)

    @property
    def class_names(self) -> None:
        """None: an image has several labels, see ``attributes``."""
        return None

    def attribute_labels(self, split: Split) -> dict[str, np.ndarray]:
        """Return {attribute: int64 (N,)}, -100 if missing, in the dataset's order."""
        return {name: self._label(name, classes, split) for name, classes in (self.attributes or {}).items()}

    def _label(self, attribute: str, classes: list[str], split: Split) -> np.ndarray:
        label = {name: i for i, name in enumerate(classes)}
        recipes = [_recipe_classes(self.recipes[number], attribute) for number in self._splits[split]]
        return np.array(
            [next((label[name] for name in names if name in label), MISSING) for names in recipes], np.int64
        )

    def _multi_hot(self, split: Split) -> np.ndarray:
        """Return the ingredients of a split, uint8 (N, V)."""
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

    def source_name(self, split: Split) -> str:
        return split

    def missing_source(self, split: Split) -> str:
        return "" if split == "train" or self.fractions[split] else f"{split}_fraction is 0, so there are no recipes"

    def read_listing(self, split: Split) -> Listing:
        labels = self._label(self.balance, self.classes or [], split)
        classes = [*(self.classes or []), *([f"(no {self.balance})"] if (labels < 0).any() else [])]
        names = [f"{IMAGES}/{self.image_files[n]}" for n in self._splits[split]]
        labels = np.where(labels < 0, len(classes) - 1, labels).astype(np.int32)
        missing: list[str] = []
        if self.unpaired == "error":
            missing += [f"{IMAGES}/img{n:05d}.jpg" for n in sorted(self.json_files.keys() - self.image_files.keys())]
            missing += [
                f"{METADATA}/meta{n:05d}.json" for n in sorted(self.image_files.keys() - self.json_files.keys())
            ]
        return Listing(classes, PackedStrings(names), labels, missing=missing)

    def dataset(self, split: Split) -> ImageDataset:
        """Return the images of a split, see `RecipeDataset`; without labels for ``predict``.

        Raises:
            DatasetError: see `problems`; for ``predict``, there are no images.
        """
        images = super().dataset(split)
        if split == "predict":
            return images
        ingredients = self._multi_hot(split) if self.ingredient_names else None
        return RecipeDataset(images, self.attribute_labels(split), ingredients)

    def problems(self, split: Split) -> list[str]:
        """See `ClassificationData`; also unpaired files of all splits."""
        lines = self._unpaired() if self.unpaired == "error" else []
        advice = "complete the dataset, or ignore them with --data.unpaired skip"
        return [f"{line}; {advice}" for line in lines] or super().problems(split)

    def _unpaired(self) -> list[str]:
        """Describe the images without JSON file and the JSON files without image, one line each."""
        lines = []
        for files, partners, noun, partner in (
            (self.image_files, self.json_files, "image", "JSON file"),
            (self.json_files, self.image_files, "JSON file", "image"),
        ):
            if unpaired := [files[number] for number in sorted(files.keys() - partners.keys())]:
                lines.append(f"{summarize_names(unpaired, noun)} without {partner} of that number")
        return lines

    def notes(self, split: Split) -> list[str]:
        """See `ClassificationData`; also how many recipes of all splits lack a label or have several."""
        recipes, lines = self.recipes.values(), super().notes(split)
        counts = []
        for name in self.given_classes:
            known = set((self.attributes or {}).get(name, ()))
            found = [known.intersection(_recipe_classes(recipe, name)) for recipe in recipes]
            noun = "flavors" if name == "taste" else name
            counts.append((sum(not names for names in found), f"without {noun} (no label)"))
            counts.append((sum(len(names) > 1 for names in found), f"with several {name}s (the first is the label)"))
        if self.vocabulary_size:
            counts.append((sum(recipe.words is None for recipe in recipes), "without ingredients (no label)"))
        if parts := [f"{count} {text}" for count, text in counts if count]:
            lines.append(f"of {len(recipes)} recipes {', '.join(parts)}")
        if self.unpaired == "skip":
            lines += [f"ignored {line}" for line in self._unpaired()]
        return lines

    def expected_layout(self) -> str:
        return f"  {self.folder}/\n    {IMAGES}/img00001.jpg, ...\n    {METADATA}/meta00001.json, ..."


# --- metadata -----------------------------------------------------------------------------------------------------


def _recipe_classes(recipe: Recipe, attribute: str) -> list[str]:
    """Return the classes of an attribute that a recipe lists."""
    if attribute == "taste":
        return [recipe.taste] if recipe.taste else []
    return recipe.cuisines if attribute == "cuisine" else recipe.courses


def read_recipe(path: str) -> Recipe:
    """Read a recipe's JSON file.

    Raises:
        DatasetError: the file is not valid JSON or not a recipe.
    """
    content = load_json(path, "a recipe's JSON")
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected a recipe's JSON object, found {str(content)[:40]}")
    attributes = content.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise DatasetError(f"{path}: attributes: expected an object, found {str(attributes)[:40]}")
    lines = _strings(path, content, "ingredientLines")
    return Recipe(
        cuisines=_strings(path, attributes, "cuisine"),
        courses=_strings(path, attributes, "course"),
        taste=strongest_flavor(path, content.get("flavors")),
        words=ingredient_words(lines) if lines else None,
    )


def _strings(path: str, content: dict[str, Any], key: str) -> list[str]:
    """Return the strings of a key, stripped, without empty ones and duplicates; a string counts as a list of one."""
    values = content.get(key) or []
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DatasetError(f"{path}: {key}: expected a list of strings, found {str(values)[:40]}")
    return list(dict.fromkeys(value.strip() for value in values if value.strip()))


def strongest_flavor(path: str, flavors: Any) -> str | None:
    """Return the flavor with the largest value, the first by name on ties; None without flavors or if all are 0.

    Args:
        path: the file, for messages.
        flavors: {flavor: number or null}, in any letter case.

    Raises:
        DatasetError: ``flavors`` is not an object of Yummly's six flavors and numbers.
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
    """Extract the words that may name an ingredient: ``2 large eggs, beaten`` gives ``egg``.

    Words are singular (`singular`): berries, tomatoes, peaches become berry, tomato, peach; hummus and watercress stay.
    """
    words = {singular(word) for line in lines for word in re.findall(r"[^\W\d_]+", line.lower())}
    return frozenset(word for word in words if len(word) > 1 and word not in NON_INGREDIENTS)


def singular(word: str) -> str:
    """Return the singular of a lower-case English noun; a word that is no plural is returned unchanged.

    Libraries for inflection are not used: they take hummus, asparagus and couscous for plurals, and spoil olives.
    """
    if word in _SINGULARS:
        return _SINGULARS[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("oes", "ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us")) else word
