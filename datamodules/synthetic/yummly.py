"""Draws a small dataset in Yummly-28K's layout: food shows the cuisine, the plate the course, the garnish the taste."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import cv2
import numpy as np

from datamodules.synthetic.drawing import Brush, background, check_arguments, save, with_noise

# Hue, saturation and value of the food, the kind of its pieces, and what it is made of.
CUISINES: dict[str, tuple[float, float, float, str, list[str]]] = {
    "American": (0.08, 0.8, 0.65, "slabs", ["beef patty", "cheddar cheese"]),
    "Chinese": (0.3, 0.6, 0.65, "grains", ["soy sauce", "white rice"]),
    "Mexican": (0.0, 0.8, 0.75, "disks", ["corn tortillas", "black beans"]),
    "Italian": (0.13, 0.6, 0.9, "strands", ["spaghetti", "parmesan cheese"]),
    "Indian": (0.11, 0.95, 0.75, "grains", ["basmati rice", "turmeric"]),
    "French": (0.1, 0.3, 0.9, "slabs", ["butter", "shallots"]),
    "Greek": (0.4, 0.35, 0.85, "disks", ["olives", "feta cheese"]),
    "Japanese": (0.95, 0.45, 0.9, "strands", ["soba noodles", "nori"]),
    "Spanish": (0.05, 0.9, 0.9, "grains", ["saffron", "paprika"]),
    "Thai": (0.22, 0.6, 0.8, "strands", ["coconut milk", "lemongrass"]),
}
COURSES = {
    "Appetizers": "pita bread",
    "Desserts": "vanilla extract",
    "Main Dishes": "onions",
    "Soups": "vegetable broth",
}
TASTES = {"Piquant": "red chili peppers", "Salty": "anchovies", "Sour": "lemons", "Sweet": "brown sugar"}
AMOUNTS = ("1 cup", "2 tablespoons", "1/2 teaspoon", "3 large", "1 (14 oz.) can", "250 g")
COMMON = ("salt", "olive oil", "garlic cloves, minced", "water", "ground black pepper")


def write_yummly(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Writes ``folder/Yummly28K/images27638/img<number>.jpg`` and ``metadata27638/meta<number>.json``.

    Cuisine, course and taste are drawn independently: color and pieces of the food show the first, the shape of the
    plate the second, the shape of the garnish the third. Each brings ingredients of its own, among common ones. One
    recipe in eight has no flavours, one in ten a second cuisine, one in ten a second course, after the one that is
    drawn. The files are a function of the arguments alone; the images' sides are ``size`` to 1.3 times that.

    Args:
        folder: where; it is made if missing, and what was written there before stays.
        classes: number of cuisines, 2 to 10; there are four courses and four tastes.
        train, val: their sum is the number of recipes a cuisine; the layout has no splits.
        size: shorter side of the images in pixels, at least 16.
        seed: another seed draws other images.

    Returns:
        Names of the cuisines, sorted: label order.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(classes, len(CUISINES), train, val, size)
    top = os.path.join(folder, "Yummly28K")
    for name in ("images27638", "metadata27638"):
        os.makedirs(os.path.join(top, name), exist_ok=True)
    cuisines = list(CUISINES)[:classes]
    for i in range(classes * (train + val)):
        rng = np.random.default_rng((seed, i))
        cuisine = cuisines[i % classes]
        course, taste = str(rng.choice(list(COURSES))), str(rng.choice(list(TASTES)))
        picture = draw_recipe(cuisine, course, taste, size, rng)
        save(os.path.join(top, "images27638", f"img{i + 1:05d}.jpg"), picture)
        with open(os.path.join(top, "metadata27638", f"meta{i + 1:05d}.json"), "w") as file:
            json.dump(_metadata(i, cuisine, course, taste, cuisines, rng), file)
    return sorted(cuisines)


def _metadata(
    i: int, cuisine: str, course: str, taste: str, cuisines: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    own = [*CUISINES[cuisine][4], COURSES[course], TASTES[taste]]
    common = rng.choice(COMMON, 2, replace=False).tolist()
    recipe: dict[str, Any] = {
        "id": f"drawn-{i + 1}",
        "name": f"{taste} {cuisine} {course}",
        "ingredientLines": [f"{rng.choice(AMOUNTS)} {thing}" for thing in rng.permutation(own + common)],
        "attributes": {"cuisine": [cuisine], "course": [course]},
        "numberOfServings": int(rng.integers(1, 9)),
    }
    if i % 10 == 3:
        recipe["attributes"]["cuisine"] += [other for other in cuisines if other != cuisine][:1]
    if i % 10 == 7:
        recipe["attributes"]["course"] += [other for other in COURSES if other != course][:1]
    # The real ones are without flavours in both ways, and their keys begin with capitals or not.
    if i % 8 != 5:
        weak = {name: round(float(rng.uniform(0, 0.6)), 3) for name in (*TASTES, "Bitter", "Meaty")}
        flavors = weak | {taste: round(float(rng.uniform(0.7, 1)), 3)}
        recipe["flavors"] = {k.lower(): v for k, v in flavors.items()} if i % 5 == 0 else flavors
    elif i % 16 == 5:
        recipe["flavors"] = {}
    return recipe


def draw_recipe(cuisine: str, course: str, taste: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image: uint8 (H,W,3), RGB, its shorter side ``size``.

    Args:
        cuisine, course, taste: of `CUISINES`, `COURSES` and `TASTES`.
        size: in pixels.
        rng: where all randomness comes from.
    """
    longer = int(size * rng.uniform(1, 1.3))
    height, width = (size, longer) if rng.random() < 0.7 else (longer, size)
    # Drawn at twice the size: smooth edges once reduced.
    canvas = np.clip(0.6 * background(2 * height, 2 * width, rng), 0, 255).astype(np.uint8)
    brush = Brush(
        canvas, np.array([width, height]) + rng.normal(0, 0.04 * size, 2), size * rng.uniform(0.82, 0.95), rng
    )
    _plate(brush, course)
    _food(brush, cuisine)
    _garnish(brush, taste)
    picture = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float64)
    light = rng.uniform(0.8, 1.1) * rng.uniform(0.93, 1.07, 3)  # its strength, and its color
    return with_noise(picture * light, rng)


def _plate(brush: Brush, course: str) -> None:
    pale = brush.tone(brush.rng.random(), 0.05, 0.92)
    rim = [0.8 * channel for channel in pale]
    if course == "Main Dishes":
        brush.disk((0, 0), 1, rim)
        brush.disk((0, 0), 0.9, pale)
    elif course == "Desserts":
        for side, tone in ((0.92, rim), (0.84, pale)):
            brush.polygon([(-side, -side), (side, -side), (side, side), (-side, side)], tone)
    elif course == "Appetizers":
        for extra, tone in ((0.0, rim), (0.06, pale)):
            brush.arc((0, 0), (1.15 - extra, 0.62 - extra), tone)
    else:
        for x in (-0.85, 0.85):
            brush.arc((x, 0), (0.2, 0.13), rim, thickness=0.1)
        brush.disk((0, 0), 0.82, rim)
        brush.disk((0, 0), 0.62, [0.55 * channel for channel in pale])


def _food(brush: Brush, cuisine: str) -> None:
    hue, saturation, value, pieces, _ = CUISINES[cuisine]
    rng = brush.rng
    brush.disk((0, 0), 0.5, brush.tone(hue, saturation, 0.7 * value))

    def tone() -> list[float]:
        return brush.tone(hue, saturation, value * rng.uniform(0.75, 1.1))

    if pieces == "strands":
        for _ in range(40):
            start, axes = rng.uniform(0, 360), rng.uniform(0.15, 0.4, 2)
            brush.arc(brush.anywhere(0.2), tuple(axes), tone(), rng.uniform(0, 360), (start, start + 150), 0.05)
    elif pieces == "grains":
        for _ in range(200):
            brush.arc(brush.anywhere(0.5), (0.06, 0.028), tone(), rng.uniform(0, 360))
    elif pieces == "disks":
        for _ in range(16):
            brush.disk(brush.anywhere(0.42), 0.13, tone())
    else:
        for _ in range(9):
            at, angle = brush.anywhere(0.38), rng.uniform(0, math.pi)
            brush.stick(at, angle, 0.25, 0.16, tone())


def _garnish(brush: Brush, taste: str) -> None:
    rng = brush.rng
    brush.center = np.array(brush.at(brush.anywhere(0.12)), float)
    brush.turn = rng.uniform(0, 2 * math.pi)
    if taste == "Sour":  # a slice of lemon
        brush.disk((0, 0), 0.36, brush.tone(0.15, 0.7, 0.95))
        brush.disk((0, 0), 0.25, brush.tone(0.15, 0.25, 1.0))
    elif taste == "Salty":  # anchovies
        for x in (-0.26, 0.0, 0.26):
            brush.stick(np.array([x, 0.0]), math.pi / 2, 0.65, 0.1, brush.tone(0.6, 0.3, 0.35))
    elif taste == "Piquant":  # rings of chili
        for _ in range(7):
            brush.arc(brush.anywhere(0.42), (0.1, 0.1), brush.tone(0.99, 0.9, 0.3), thickness=0.06)
    else:  # icing
        corners = [(0.4 * math.cos(a), 0.4 * math.sin(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        brush.polygon(corners, brush.tone(0.83, 0.25, 0.95))
