"""Yummly-28K: pairs by number, missing labels, ingredients, splits, and wrong layouts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.classification.yummly import (
    MISSING,
    TASTES,
    Yummly28K,
    ingredient_words,
    read_recipe,
    singular,
    strongest_flavor,
)
from datamodules.images import read_image
from datamodules.synthetic.yummly import COURSES, write_yummly
from errors import BrokenImageError, DatasetError, UserError

ITALIAN = {"attributes": {"cuisine": ["Italian"], "course": ["Soups"]}, "flavors": {"Salty": 0.5}}


def plant(root: Path, recipes: dict[int, dict[str, Any] | str | None], images: list[int] | None = None) -> str:
    """Write recipes by number (None: no JSON file, a str: verbatim), and for each an image whose gray is its number."""
    for name in ("images27638", "metadata27638"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, recipe in recipes.items():
        if recipe is not None:
            text = recipe if isinstance(recipe, str) else json.dumps(recipe)
            (root / "metadata27638" / f"meta{number:05d}.json").write_text(text)
    for number in recipes if images is None else images:
        Image.fromarray(np.full((24, 24, 3), number % 256, np.uint8)).save(root / f"images27638/img{number:05d}.jpg")
    return str(root)


def yummly(root: str | None, **options: Any) -> Yummly28K:
    return Yummly28K(root, **{"image_size": 16, "num_workers": 0, "vocabulary_size": 8, **options})


def all_samples(data: Yummly28K) -> dict[int, dict[str, Any]]:
    """All samples of all splits by their recipe's number."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for split in ("train", "val", "test"):
            if not data.problems(split):  # type: ignore[arg-type]
                samples = data.dataset(split)  # type: ignore[arg-type]
                found.update({int(samples[i]["id"][-9:-4]): samples[i] for i in range(len(samples))})
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """80 recipes of four cuisines."""
    folder = tmp_path_factory.mktemp("yummly")
    write_yummly(str(folder), classes=4, train=15, val=5, size=24)
    return str(folder)


def test_the_drawn_set_is_read_as_it_was_drawn(drawn: str) -> None:
    data = yummly(drawn)
    assert data.attributes == {
        "cuisine": ["American", "Chinese", "Italian", "Mexican"],
        "course": sorted(COURSES),
        "taste": TASTES,
    }
    samples = all_samples(data)
    assert sorted(samples) == list(range(1, 81))
    for number, sample in samples.items():
        recipe = json.loads(Path(drawn, f"Yummly28K/metadata27638/meta{number:05d}.json").read_text())
        taste, cuisine, course = recipe["name"].split(" ", 2)
        assert data.attributes["cuisine"][sample["labels"]["cuisine"]] == cuisine
        assert data.attributes["course"][sample["labels"]["course"]] == course
        label = sample["labels"]["taste"]
        assert label == (data.attributes["taste"].index(taste) if recipe.get("flavors") else MISSING)
        assert sample["image"].shape == (3, 16, 16)
    assert sum(sample["labels"]["taste"] == MISSING for sample in samples.values()) == 10


def test_a_batch_follows_the_contract(drawn: str) -> None:
    batch = next(iter(yummly(drawn, batch_size=8).train_dataloader()))
    assert {name: (label.dtype, len(label)) for name, label in batch["labels"].items()} == dict.fromkeys(
        ("cuisine", "course", "taste"), (torch.int64, 8)
    )
    assert (batch["ingredients"].dtype, tuple(batch["ingredients"].shape)) == (torch.uint8, (8, 8))
    assert "ingredients" not in next(iter(yummly(drawn, vocabulary_size=0).train_dataloader()))
    assert yummly(drawn, vocabulary_size=0).ingredient_names == []


def test_what_is_missing_or_several_is_counted_in_one_line(drawn: str) -> None:
    with pytest.warns(UserWarning, match="recipes") as caught:
        yummly(drawn).dataset("train")
    lines = [str(w.message) for w in caught if "recipes" in str(w.message)]
    assert lines == [
        "of 80 recipes 8 with several cuisines (the first is the label), 8 with several courses (the first is the "
        "label), 10 without flavors (no label)"
    ]


def test_pairs_by_number_not_by_order(tmp_path: Path) -> None:
    """As names, numbers of different widths sort differently: 100000 comes before 99999."""
    recipes = {n: ITALIAN | {"name": str(n), "flavors": {TASTES[n % 6]: 1}} for n in (3, 12, 99999, 100000)}
    root = plant(tmp_path, recipes)
    (tmp_path / "images27638/img00003.jpg").rename(tmp_path / "images27638/IMG3.JPG")
    (tmp_path / "images27638/.DS_Store").touch()
    data = yummly(root, val_fraction=0, test_fraction=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = data.dataset("train")
    for i, number in enumerate(sorted(recipes)):
        sample = samples[i]
        assert sample["labels"]["taste"] == number % 6
        assert abs(int(sample["image"][0, 0, 0]) - number % 256) < 3, sample["id"]


def test_the_split_is_a_function_of_number_and_seed(drawn: str, tmp_path: Path) -> None:
    data = yummly(drawn)
    whole = {number: data.split_of(number) for number in range(1, 27639)}
    fractions = [sum(split == s for split in whole.values()) / len(whole) for s in ("train", "val", "test")]
    assert fractions == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    few = yummly(plant(tmp_path, dict.fromkeys(range(1, 20), ITALIAN)))
    for split in ("train", "val", "test"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = few.dataset(split)  # type: ignore[arg-type]
        assert [int(samples[i]["id"][-9:-4]) for i in range(len(samples))] == [
            n for n in range(1, 20) if whole[n] == split
        ]
    other = yummly(drawn, split_seed=1)
    assert sum(other.split_of(n) != split for n, split in whole.items()) > 5000


def test_labels_and_attribute_labels(drawn: str, tmp_path: Path) -> None:
    data = yummly(drawn, balance="taste")
    labels = data.labels("train")
    assert labels is not None
    tastes = data.attribute_labels("train")["taste"]
    assert labels.dtype == np.int64
    assert labels.tolist() == np.where(tastes == MISSING, -1, tastes).tolist()
    assert (labels == -1).sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = data.dataset("train")
        loader = yummly(drawn, balance="taste", sampling="balanced", batch_size=4).train_dataloader()
        seen = torch.cat([batch["labels"]["taste"] for batch in loader])
    assert [samples[i]["labels"]["taste"] for i in range(len(samples))] == tastes.tolist()
    counts = torch.bincount(seen)
    assert counts[counts > 0].tolist() == pytest.approx([len(samples) / 4] * 4, abs=1)


def test_given_cuisines(tmp_path: Path) -> None:
    """The first of those that are given counts; a recipe with none of them has no label."""
    lists = {1: ["Thai"], 2: ["Asian", "Thai"], 3: ["Asian"], 4: []}
    root = plant(tmp_path, {n: ITALIAN | {"attributes": {"cuisine": names}} for n, names in lists.items()})
    samples = all_samples(yummly(root, cuisines=["Greek", "Thai"]))
    assert [samples[n]["labels"] for n in range(1, 5)] == [
        {"cuisine": label, "taste": 3} for label in (1, 1, MISSING, MISSING)
    ]
    data = yummly(root, vocabulary_size=0, val_fraction=0, test_fraction=0)
    with pytest.warns(
        UserWarning,
        match=r"of 4 recipes 1 without cuisine .*, 1 with several cuisines .*, 4 without course \(no label\)",
    ):
        assert data.dataset("train")[1]["labels"]["cuisine"] == 0, "Asian, of Asian and Thai"


# --- ingredients ---------------------------------------------------------------------------------------------------


def test_ingredient_words() -> None:
    lines = [
        "1 1/2 cups all-purpose flour (about 5 oz.)",
        "2 large Eggs, beaten",
        "3 tomatoes, diced",
        "berries",
        "½ c molasses",
    ]
    assert ingredient_words(lines) == {"flour", "egg", "tomato", "berry", "molasses"}
    assert ingredient_words(["fresh asparagus, hummus & watercress", "crème fraîche"]) == {
        "asparagus", "hummus", "watercress", "crème", "fraîche",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        ("peaches", "peach"), ("radishes", "radish"), ("squashes", "squash"), ("sandwiches", "sandwich"),
        ("boxes", "box"), ("glasses", "glass"), ("tomatoes", "tomato"), ("potatoes", "potato"), ("mangoes", "mango"),
        ("avocados", "avocado"), ("olives", "olive"), ("chives", "chive"), ("endives", "endive"), ("cheeses", "cheese"),
        ("sauces", "sauce"), ("sausages", "sausage"), ("slices", "slice"), ("leaves", "leaf"), ("loaves", "loaf"),
        ("berries", "berry"), ("anchovies", "anchovy"), ("cookies", "cookie"), ("brownies", "brownie"),
        ("quiches", "quiche"), ("brioches", "brioche"), ("mousses", "mousse"), ("pies", "pie"), ("peas", "pea"),
        ("oats", "oat"), ("chilis", "chili"), ("kiwis", "kiwi"), ("eggs", "egg"), ("herbs", "herb"),
    ],
)  # fmt: skip
def test_a_plural_and_its_singular_are_one_ingredient(plural: str, expected: str) -> None:
    assert singular(plural) == singular(expected) == expected


@pytest.mark.parametrize(
    "word",
    ["molasses", "asparagus", "hummus", "couscous", "citrus", "watercress", "swiss", "haggis", "gras", "octopus"],
)
def test_words_that_are_no_plurals_stay(word: str) -> None:
    assert singular(word) == word


def test_the_vocabulary_is_trains(tmp_path: Path) -> None:
    data = yummly(None, images="x")
    splits = {number: data.split_of(number) for number in range(1, 60)}
    recipes = {}
    for number, split in splits.items():
        lines = ["salt", "salt", "salt"] if split == "train" else ["pepper"]
        recipes[number] = ITALIAN | {"ingredientLines": lines + (["butter"] if number % 2 else [])}
    missing, unknown = (next(n for n in reversed(splits) if splits[n] == split) for split in ("train", "val"))
    recipes[missing] = dict(ITALIAN)
    root = plant(tmp_path, recipes)
    data = yummly(root)
    assert data.ingredient_names == ["salt", "butter"]
    assert yummly(root, vocabulary_size=1).ingredient_names == ["salt"]
    samples = all_samples(data)
    assert samples[missing]["ingredients"].tolist() == [255, 255]
    assert samples[unknown]["ingredients"].tolist() == [0, unknown % 2]
    for number in set(splits) - {missing}:
        assert samples[number]["ingredients"].tolist() == [int(splits[number] == "train"), number % 2]


# --- flavors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavors", "taste"),
    [
        ({"Salty": 0.2, "SWEET": 0.9, "sour": 0.1}, "Sweet"),
        ({"Sour": 0.5, "Bitter": 0.5, "Sweet": 0.5}, "Bitter"),
        ({"Piquant": 1}, "Piquant"),
        ({"Meaty": None, "Salty": 0.1}, "Salty"),
        ({}, None),
        (None, None),
        (dict.fromkeys(TASTES, 0.0), None),
    ],
)
def test_strongest_flavor(flavors: Any, taste: str | None) -> None:
    assert strongest_flavor("x.json", flavors) == taste


@pytest.mark.parametrize("flavors", [[1], "sweet", {"Umami": 1.0}, {"Sweet": "much"}, {"Sweet": True}])
def test_flavors_of_another_kind_are_refused(flavors: Any) -> None:
    with pytest.raises(DatasetError, match="x.json: flavors: expected numbers for Bitter"):
        strongest_flavor("x.json", flavors)


# --- trees that are not right ----------------------------------------------------------------------------------------


def test_unpaired_files_are_named_counted_and_may_be_ignored(tmp_path: Path) -> None:
    recipes: dict[int, dict[str, Any] | str | None] = dict.fromkeys(range(1, 40), ITALIAN)
    root = plant(tmp_path, recipes | {4: None, 5: None}, images=[n for n in range(1, 40) if n != 7])
    with pytest.raises(DatasetError) as error:
        yummly(root).dataset("train")
    assert str(error.value) == (
        "Yummly28K: 2 images (img00004.jpg, img00005.jpg) without JSON file of that number; complete the dataset, or "
        "ignore them with --data.unpaired skip; 1 JSON file (meta00007.json) without image of that number; complete "
        "the dataset, or ignore them with --data.unpaired skip"
    )
    data = yummly(root, unpaired="skip")
    assert sorted(all_samples(data)) == [n for n in range(1, 40) if n not in (4, 5, 7)]
    with pytest.warns(UserWarning, match="ignored") as caught:
        data.dataset("train")
    lines = [str(w.message) for w in caught if "ignored" in str(w.message)]
    assert lines == [
        "ignored 2 images (img00004.jpg, img00005.jpg) without JSON file of that number",
        "ignored 1 JSON file (meta00007.json) without image of that number",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", r"meta00002.json: expected a recipe's JSON, found invalid JSON \(.*line 1 column 2"),
        ("", "meta00002.json: expected a recipe's JSON, found invalid JSON"),
        ("[]", r"meta00002.json: expected a recipe's JSON object, found \[\]"),
        ("\xff\xfe", "meta00002.json: expected a recipe's JSON, found invalid JSON"),
        ('{"attributes": {"cuisine": [3]}}', r"meta00002.json: cuisine: expected a list of strings, found \[3\]"),
        ('{"attributes": 3}', "meta00002.json: attributes: expected an object, found 3"),
        ('{"flavors": [1]}', "meta00002.json: flavors: expected numbers"),
    ],
)
def test_a_damaged_json_is_named(tmp_path: Path, text: str, expected: str) -> None:
    root = plant(tmp_path, {1: ITALIAN, 2: text, 3: ITALIAN})
    with pytest.raises(DatasetError, match=expected):
        yummly(root).dataset("train")


def test_a_recipe_with_nothing_in_it(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {1: '{"attributes": null, "flavors": null, "ingredientLines": null}', 2: {"attributes": {"cuisine": "Thai "}}},
    )
    empty, one = (read_recipe(str(tmp_path / f"metadata27638/meta0000{n}.json")) for n in (1, 2))
    assert (empty.cuisines, empty.courses, empty.taste, empty.words) == ([], [], None, None)
    assert one.cuisines == ["Thai"]


def test_a_wrong_tree_is_shown_beside_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"(?s)there is no images27638/.*expected.*meta00001.json.*no such folder"):
        yummly(str(tmp_path / "nowhere")).dataset("train")
    (tmp_path / "images27638").mkdir()
    with pytest.raises(DatasetError, match="images27638/ contains no img<number>"):
        yummly(str(tmp_path)).dataset("train")
    plant(tmp_path / "apart", {1: ITALIAN, 2: None}, images=[2])
    with pytest.raises(DatasetError, match="1 image .img00002.jpg. without JSON file"):
        yummly(str(tmp_path / "apart")).dataset("train")
    with pytest.raises(DatasetError, match="--data.root FOLDER"):
        yummly(None).dataset("train")
    root = plant(tmp_path / "twice", {1: ITALIAN})
    Image.new("RGB", (8, 8)).save(tmp_path / "twice/images27638/img1.jpg")
    with pytest.raises(DatasetError, match="expected one file per number, found img00001.jpg and img1.jpg"):
        yummly(root).dataset("train")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"vocabulary_size": -1}, "vocabulary_size: expected 0 or more, found -1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "together less than 1, found 0.5 and 0.5"),
        ({"test_fraction": -0.1}, "expected 0 or more"),
    ],
)
def test_bad_arguments(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        yummly("x", **options)


def test_a_split_of_nothing_is_refused(tmp_path: Path) -> None:
    data = yummly(plant(tmp_path, dict.fromkeys(range(1, 9), ITALIAN)), val_fraction=0)
    with pytest.raises(DatasetError, match="val_fraction is 0, so there are no recipes for val"):
        data.dataset("val")


def test_a_truncated_image_is_named(drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yummly(str(tmp_path), classes=2, train=8, val=2, size=24)
    data = yummly(str(tmp_path), val_fraction=0.3, test_fraction=0, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for split in ("train", "val"):
            path = tmp_path / "Yummly28K" / data.dataset(split)[0]["id"]  # type: ignore[arg-type]
            path.write_bytes(path.read_bytes()[:300])
            with pytest.raises(BrokenImageError, match="truncated"):
                read_image(str(path))
        assert sum(len(batch["image"]) for batch in data.train_dataloader()) == len(data.dataset("train"))
        assert "skipped, 1 so far" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"img.*truncated.*--data.broken_images skip"):
            list(data.val_dataloader())


def test_prediction_needs_no_dataset(drawn: str) -> None:
    data = yummly(None, images=f"{drawn}/Yummly28K/images27638")
    assert (data.attributes, data.ingredient_names, data.num_classes) == (None, None, 0)
    samples = data.dataset("predict")
    assert len(samples) == 80
    assert samples[0].keys() == {"image", "id"}


def test_a_class_listed_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"cuisines: expected different names, found 1 name \(Thai\) more than once"):
        yummly(None, images="x", cuisines=["Thai", "Greek", "Thai"])


def test_metadata_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "meta00001.json"
    path.write_bytes(json.dumps({"attributes": {"cuisine": ["Crème"]}}, ensure_ascii=False).encode("utf-16"))
    assert read_recipe(str(path)).cuisines == ["Crème"]
