"""Synthetic dataset in the layout of Yummly-28K: cuisine, course and taste are visible in food, plate and garnish."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np

from datamodules.synthetic.drawing import (
    DishCanvas,
    check_arguments,
    draw_background,
    finish_image,
    random_shape,
    save_jpeg,
)

# Hue, saturation and value of the food, the shape of its pieces, and its ingredients.
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
COMMON_INGREDIENTS = ("salt", "olive oil", "garlic cloves, minced", "water", "ground black pepper")


def write_yummly(
    folder: str, classes: int = 4, train: int = 64, val: int = 16, size: int = 64, seed: int = 0
) -> list[str]:
    """Write ``folder/Yummly28K/images27638/img<number>.jpg`` and ``metadata27638/meta<number>.json``.

    Cuisine, course and taste are independent. Color and pieces of the food show the cuisine, the shape of the plate
    shows the course, and the shape of the garnish shows the taste. Each adds its ingredients to common ones. One
    recipe in eight has no flavors. One in ten lists a second cuisine and one in ten a second course, which are not
    visible. The files depend only on the arguments.

    Args:
        folder: output folder, created if missing; existing files stay.
        classes: number of cuisines, 2 to 10; there are four courses and four tastes.
        train: recipes per cuisine, added to ``val`` because the layout has no splits.
        val: recipes per cuisine, added to ``train``.
        size: shorter side of the images in pixels, at least 16; the longer one is up to 1.3 times as long.
        seed: another seed draws other images.

    Returns:
        Names of the cuisines, sorted, in label order.

    Raises:
        UserError: an argument is out of range.
    """
    check_arguments(classes, len(CUISINES), train, val, size)
    root = os.path.join(folder, "Yummly28K")
    for name in ("images27638", "metadata27638"):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    cuisines = list(CUISINES)[:classes]
    for i in range(classes * (train + val)):
        rng = np.random.default_rng((seed, i))
        cuisine = cuisines[i % classes]
        course, taste = str(rng.choice(list(COURSES))), str(rng.choice(list(TASTES)))
        image = draw_recipe(cuisine, course, taste, size, rng)
        save_jpeg(os.path.join(root, "images27638", f"img{i + 1:05d}.jpg"), image)
        with open(os.path.join(root, "metadata27638", f"meta{i + 1:05d}.json"), "w") as file:
            json.dump(_metadata(i, cuisine, course, taste, cuisines, rng), file)
    return sorted(cuisines)


def _metadata(
    i: int, cuisine: str, course: str, taste: str, cuisines: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    """Return the content of a metadata file."""
    ingredients = [*CUISINES[cuisine][4], COURSES[course], TASTES[taste]]
    common = rng.choice(COMMON_INGREDIENTS, 2, replace=False).tolist()
    recipe: dict[str, Any] = {
        "id": f"drawn-{i + 1}",
        "name": f"{taste} {cuisine} {course}",
        "ingredientLines": [
            f"{rng.choice(AMOUNTS)} {ingredient}" for ingredient in rng.permutation(ingredients + common)
        ],
        "attributes": {"cuisine": [cuisine], "course": [course]},
        "numberOfServings": int(rng.integers(1, 9)),
    }
    if i % 10 == 3:
        recipe["attributes"]["cuisine"] += [other for other in cuisines if other != cuisine][:1]
    if i % 10 == 7:
        recipe["attributes"]["course"] += [other for other in COURSES if other != course][:1]
    # As in the release, flavors are missing or empty, and their keys are capitalized or not.
    if i % 8 != 5:
        weak = {name: round(float(rng.uniform(0, 0.6)), 3) for name in (*TASTES, "Bitter", "Meaty")}
        flavors = weak | {taste: round(float(rng.uniform(0.7, 1)), 3)}
        recipe["flavors"] = {k.lower(): v for k, v in flavors.items()} if i % 5 == 0 else flavors
    elif i % 16 == 5:
        recipe["flavors"] = {}
    return recipe


def draw_recipe(cuisine: str, course: str, taste: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of a recipe.

    Args:
        cuisine: one of `CUISINES`.
        course: one of `COURSES`.
        taste: one of `TASTES`.
        size: shorter side in pixels.
        rng: source of all randomness.

    Returns:
        RGB image, uint8 (H, W, 3).
    """
    height, width = random_shape(size, rng, max_ratio=1.3)
    image = np.clip(0.6 * draw_background(2 * height, 2 * width, rng), 0, 255).astype(np.uint8)
    center = np.array([width, height]) + rng.normal(0, 0.04 * size, 2)
    dish = DishCanvas(image, center, size * rng.uniform(0.82, 0.95), rng)
    _draw_plate(dish, course)
    _draw_food(dish, cuisine)
    _draw_garnish(dish, taste)
    return finish_image(image, (0.8, 1.1), (0.93, 1.07), rng)


def _draw_plate(dish: DishCanvas, course: str) -> None:
    pale = dish.color(dish.rng.random(), 0.05, 0.92)
    rim = [0.8 * channel for channel in pale]
    if course == "Main Dishes":
        dish.disk((0, 0), 1, rim)
        dish.disk((0, 0), 0.9, pale)
    elif course == "Desserts":
        for side, color in ((0.92, rim), (0.84, pale)):
            dish.polygon([(-side, -side), (side, -side), (side, side), (-side, side)], color)
    elif course == "Appetizers":
        for extra, color in ((0.0, rim), (0.06, pale)):
            dish.arc((0, 0), (1.15 - extra, 0.62 - extra), color)
    else:
        for x in (-0.85, 0.85):
            dish.arc((x, 0), (0.2, 0.13), rim, thickness=0.1)
        dish.disk((0, 0), 0.82, rim)
        dish.disk((0, 0), 0.62, [0.55 * channel for channel in pale])


def _draw_food(dish: DishCanvas, cuisine: str) -> None:
    hue, saturation, value, pieces, _ = CUISINES[cuisine]
    rng = dish.rng
    dish.disk((0, 0), 0.5, dish.color(hue, saturation, 0.7 * value))

    def food_color() -> list[float]:
        return dish.color(hue, saturation, value * rng.uniform(0.75, 1.1))

    if pieces == "strands":
        for _ in range(40):
            start, axes = rng.uniform(0, 360), rng.uniform(0.15, 0.4, 2)
            dish.arc(dish.random_point(0.2), tuple(axes), food_color(), rng.uniform(0, 360), (start, start + 150), 0.05)
    elif pieces == "grains":
        for _ in range(200):
            dish.arc(dish.random_point(0.5), (0.06, 0.028), food_color(), rng.uniform(0, 360))
    elif pieces == "disks":
        for _ in range(16):
            dish.disk(dish.random_point(0.42), 0.13, food_color())
    else:
        for _ in range(9):
            center, angle = dish.random_point(0.38), rng.uniform(0, math.pi)
            dish.stick(center, angle, 0.25, 0.16, food_color())


def _draw_garnish(dish: DishCanvas, taste: str) -> None:
    rng = dish.rng
    dish.center = np.array(dish.to_pixels(dish.random_point(0.12)), float)
    dish.rotation = rng.uniform(0, 2 * math.pi)
    if taste == "Sour":  # a slice of lemon
        dish.disk((0, 0), 0.36, dish.color(0.15, 0.7, 0.95))
        dish.disk((0, 0), 0.25, dish.color(0.15, 0.25, 1.0))
    elif taste == "Salty":  # anchovies
        for x in (-0.26, 0.0, 0.26):
            dish.stick(np.array([x, 0.0]), math.pi / 2, 0.65, 0.1, dish.color(0.6, 0.3, 0.35))
    elif taste == "Piquant":  # rings of chili
        for _ in range(7):
            dish.arc(dish.random_point(0.42), (0.1, 0.1), dish.color(0.99, 0.9, 0.3), thickness=0.06)
    else:  # icing
        corners = [(0.4 * math.cos(a), 0.4 * math.sin(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        dish.polygon(corners, dish.color(0.83, 0.25, 0.95))
