"""The random split of `prepare`, and the recipes for small data sets."""

import math
from collections import Counter
from pathlib import Path

import pytest

from src.data.prepare.labels import Picture
from src.data.prepare.split import split_at_random
from src.data.recipes import RECIPES, closest_recipe


def picture(name: str, *categories: int) -> Picture:
    return Picture(Path(name), 10, 10, [{"category_id": category} for category in categories])


PICTURES = [
    picture(f"{n}.jpg", *{1, 2 + n % 3, *([7] if n in (4, 50) else []), *([8] if n == 9 else [])}) for n in range(100)
]


def test_the_fraction_holds_for_all_and_for_each_category():
    validates = split_at_random(PICTURES, fraction=0.2, seed=0)
    assert sum(validates) == pytest.approx(20, abs=1)
    counts = Counter(c for p, val in zip(PICTURES, validates, strict=True) if val for c in p.categories)
    totals = Counter(c for p in PICTURES for c in p.categories)
    assert all(counts[c] == pytest.approx(0.2 * totals[c], abs=1.5) for c in (1, 2, 3, 4))


def test_a_rare_category_is_in_both_splits_and_a_single_picture_trains():
    for seed in range(20):
        validates = split_at_random(PICTURES, fraction=0.2, seed=seed)
        assert validates[4] != validates[50]
        assert not validates[9]


def test_pictures_without_boxes_are_split_too():
    validates = split_at_random([*PICTURES, *(picture(f"e{n}.jpg") for n in range(10))], fraction=0.2, seed=0)
    assert sum(validates[100:]) == 2


def test_the_split_depends_only_on_names_labels_and_seed():
    first = split_at_random(PICTURES, fraction=0.2, seed=0)
    moved = [Picture(Path("elsewhere") / p.path, 10, 10, p.boxes) for p in reversed(PICTURES)]
    assert split_at_random(moved, fraction=0.2, seed=0) == first[::-1]
    assert split_at_random(PICTURES, fraction=0.2, seed=1) != first


@pytest.mark.parametrize("count", [2, 3])
def test_two_or_three_pictures_are_in_both_splits(count):
    validates = split_at_random([picture(f"{n}.jpg", 1) for n in range(count)], fraction=0.2, seed=0)
    assert sum(validates) == 1


@pytest.mark.parametrize("pictures", [60, 100, 150, 223, 224, 500, 999, 1001, 2000, 4472, 4473, 10_000, 20_000])
def test_the_closest_recipe_fits(pictures):
    recipe = closest_recipe(pictures)
    per_epoch = math.ceil(pictures / recipe.batch_size)
    iterations = per_epoch * recipe.epochs
    assert recipe.iterations(pictures) == iterations >= 3_000
    assert recipe.warmup <= iterations / 4
    assert recipe.warmup < recipe.multistep[0] * per_epoch
    assert max(recipe.multistep) < recipe.epochs
    assert recipe.evaluation[-1] == recipe.epochs - 1
    assert recipe.batch_size * 0.13 < 6


def test_there_are_four_recipes():
    assert [recipe.pictures for recipe in RECIPES] == [100, 500, 2_000, 10_000]
