"""Draws a small data set in the COCO 2017 layout: `python -m src.data.synthetic DIR`.

Coloured discs, squares, triangles and stars on muted gradients, noise, stripes and blobs, easy enough for a network
with random weights to learn to find them in minutes.  Each kind has its own range of hues, and an object spans a fifth
to two thirds of the picture.  A picture depends only on the seed, the split and its number, so equal seeds give equal
bytes.
"""

import argparse
import colorsys
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from src.runtime.errors import UserError

PROGRAM = "python -m src.data.synthetic"
README = "README.txt"
README_TEXT = (
    "Drawn by `python -m src.data.synthetic --images {images} --val-images {val_images} --seed {seed}`;"
    " no photographs.\n"
)
SPLITS = ("train", "val")
OWN_FILES = re.compile(rf"{README}|annotations/instances_(train|val)2017\.json|(train|val)2017/\d{{6,}}\.jpg")

SIZES = ((320, 240), (240, 320), (300, 300), (400, 300), (280, 360), (360, 202))  # width, height in pixels
EMPTY_EVERY = 16  # every 16th picture has no object
OBJECTS = (1, 3)  # least and most in any other picture
OBJECT_SIZE = (0.26, 0.66)  # diameter of the circle around an object, as a fraction of the picture's shorter side
MAX_OVERLAP = 0.15  # of two boxes, as a fraction of the smaller one's area
ATTEMPTS = 40  # to place an object before it is left out
SUPERSAMPLING = 4  # shapes are drawn at 4 times the resolution, then reduced
JPEG: dict[str, Any] = {"quality": 92, "subsampling": 0, "optimize": False}


class Kind(NamedTuple):
    id: int  # with gaps, as COCO's ids have
    name: str
    hues: tuple[float, float]  # degrees


# The augmentation shifts hues by up to 18 degrees; the gaps are wider, so colour alone nearly identifies a kind.
KINDS = (
    Kind(1, "disc", (-12, 6)),
    Kind(3, "square", (105, 135)),
    Kind(4, "triangle", (208, 232)),
    Kind(8, "star", (48, 60)),
)


class Shape(NamedTuple):
    kind: Kind
    outline: np.ndarray  # [P, 2] x, y in pixels
    colour: tuple[float, float, float]  # RGB in 0..1


def draw_dataset(folder: Path | str, *, images: int, val_images: int, seed: int) -> None:
    """Draws `images` training and `val_images` validation pictures with their annotations into `folder`.

    Replaces a data set that it drew earlier.  If the folder holds anything else, raises UserError and changes nothing.
    """
    if images < 1 or val_images < 1 or seed < 0:
        raise UserError("a data set needs at least one image for training, one for validation and a seed of 0 or more")
    folder = Path(folder)
    try:
        _clear(folder)
        # Written first, so that an interrupted drawing can be replaced too.
        (folder / README).write_text(README_TEXT.format(images=images, val_images=val_images, seed=seed))
        first_id = 1
        for split, count in zip(SPLITS, (images, val_images), strict=True):
            _draw_split(folder, split, range(first_id, first_id + count), seed)
            first_id += count
    except OSError as error:
        raise UserError(f"cannot write the data set: {error}") from error


def _clear(folder: Path) -> None:
    """Empties `folder` except for the README.  Raises UserError if it holds a file that this module did not write."""
    files = [path for path in folder.rglob("*") if not path.is_dir()] if folder.exists() else []
    foreign = [path for path in files if not OWN_FILES.fullmatch(path.relative_to(folder).as_posix())]
    if foreign or (files and not (folder / README).is_file()):
        raise UserError(
            f"{folder} holds files that src.data.synthetic did not write ({(foreign or files)[0]}): name a new folder"
        )
    for path in files:
        if path != folder / README:
            path.unlink()
    for name in ("annotations", *(f"{split}2017" for split in SPLITS)):
        (folder / name).mkdir(parents=True, exist_ok=True)


def _draw_split(folder: Path, split: str, ids: range, seed: int) -> None:
    images, annotations = [], []
    for number, image_id in enumerate(ids):
        random = np.random.default_rng((seed, SPLITS.index(split), number))
        size = SIZES[random.integers(len(SIZES))]
        shapes = [] if number % EMPTY_EVERY == EMPTY_EVERY - 1 else _scene(random, *size)
        name = f"{image_id:06d}.jpg"
        _picture(random, size, shapes).save(folder / f"{split}2017" / name, **JPEG)
        images.append({"license": 1, "file_name": name, "height": size[1], "width": size[0], "id": image_id})
        annotations += [_annotation(shape, image_id) for shape in shapes]
    content = {
        "info": {"description": "Drawn sample data set", "version": "1.0", "year": 2017, "url": ""},
        "licenses": [{"id": 1, "name": "Drawn by a program: no rights reserved", "url": ""}],
        "images": images,
        "annotations": [{**annotation, "id": n} for n, annotation in enumerate(annotations, 1)],
        "categories": [{"supercategory": "shape", "id": kind.id, "name": kind.name} for kind in KINDS],
    }
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _annotation(shape: Shape, image_id: int) -> dict:
    outline = shape.outline.round(2)
    x, y = outline.T
    left, top, right, bottom = _bounds(outline)
    return {
        "segmentation": [outline.ravel().tolist()],
        "area": round(float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2), 2),  # the shoelace formula
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
        "category_id": shape.kind.id,
    }


def _bounds(outline: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the points [P, 2]."""
    return *outline.min(axis=0).tolist(), *outline.max(axis=0).tolist()


def _scene(random: np.random.Generator, width: int, height: int) -> list[Shape]:
    """Up to three shapes that hardly overlap."""
    shapes: list[Shape] = []
    for _ in range(random.integers(OBJECTS[0], OBJECTS[1] + 1)):
        for _ in range(ATTEMPTS):
            shape = _shape(random, width, height)
            if all(_overlap(shape.outline, other.outline) <= MAX_OVERLAP for other in shapes):
                shapes.append(shape)
                break
    return shapes


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """The fraction of the smaller bounding box's area that lies inside the other box."""
    top_left, bottom_right = (
        np.maximum(first.min(axis=0), second.min(axis=0)),
        np.minimum(first.max(axis=0), second.max(axis=0)),
    )
    smaller = min(np.ptp(first, axis=0).prod(), np.ptp(second, axis=0).prod())
    return (bottom_right - top_left).clip(0).prod() / smaller


def _shape(random: np.random.Generator, width: int, height: int) -> Shape:
    kind = KINDS[random.integers(len(KINDS))]
    low, high = np.log(OBJECT_SIZE)
    radius = math.exp(random.uniform(low, high)) * min(width, height) / 2
    unit = _unit_outline(kind.name, random.uniform(-0.4, 0.4))
    top_left, bottom_right = unit.min(axis=0) * radius, unit.max(axis=0) * radius
    centre = random.uniform(1 - top_left, np.array((width, height)) - 1 - bottom_right)
    hue, saturation, value = random.uniform(*kind.hues) / 360, random.uniform(0.8, 1), random.uniform(0.7, 1)
    return Shape(kind, unit * radius + centre, colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _unit_outline(name: str, angle: float) -> np.ndarray:
    """The corners [P, 2] of a shape in the unit circle, rotated by `angle` radians."""
    corners, inner_radius = {"disc": (64, 1), "square": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}[name]
    start = math.pi / 4 if name == "square" else -math.pi / 2  # y points down
    angles = start + angle + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, inner_radius, 1)
    return np.stack((np.cos(angles) * radii, np.sin(angles) * radii), axis=1)


def _picture(random: np.random.Generator, size: tuple[int, int], shapes: list[Shape]) -> Image.Image:
    pixels = _background(random, *size)  # [H, W, 3]
    for shape in shapes:
        coverage = _coverage(shape.outline, size)[..., None]
        light = 1 + 0.15 * _ramp(random, *size)[..., None]
        pixels = pixels * (1 - coverage) + np.array(shape.colour) * light * coverage
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _coverage(outline: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The fraction of each pixel that the shape covers, [H, W] in 0..1."""
    drawn = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    corners = outline * SUPERSAMPLING - 0.5  # Pillow's coordinates are those of pixel centres
    ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    return np.asarray(drawn.resize(size, Image.Resampling.BOX), dtype=np.float64) / 255


def _background(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A background in muted colours and one of four patterns, [H, W, 3] in 0..1."""
    first, second = (_muted(random) for _ in range(2))
    pattern = (_ramp, _noise, _stripes, _blobs)[random.integers(4)]
    mix = pattern(random, width, height)[..., None] / 2 + 0.5
    grain = random.normal(0, random.uniform(0, 0.04), (height, width, 1))
    return first * (1 - mix) + second * mix + grain


def _muted(random: np.random.Generator) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(random.uniform(), random.uniform(0, 0.3), random.uniform(0.15, 0.95)))


# Patterns: [H, W] in -1..1.


def _distance(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Each pixel's signed distance from the centre along a random direction, in units of half the longer side."""
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width]
    return ((x - width / 2) * math.cos(angle) + (y - height / 2) * math.sin(angle)) * 2 / max(width, height)


def _ramp(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    return _distance(random, width, height).clip(-1, 1)


def _stripes(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    return np.sin(_distance(random, width, height) * random.uniform(6, 40))


def _noise(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    cells = random.integers(3, 24, 2)
    coarse = Image.fromarray(random.uniform(-1, 1, cells).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).clip(-1, 1)


def _blobs(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    total = np.full((height, width), -1.0)
    for _ in range(random.integers(4, 12)):
        distance = np.hypot(x - random.uniform(0, width), y - random.uniform(0, height))
        total += 2 / (1 + np.exp((distance - random.uniform(10, 60)) / 3))
    return total.clip(-1, 1)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 2 if the folder cannot be drawn into."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Draw a small data set in the COCO layout.")
    parser.add_argument("folder", metavar="DIR", help="where to: a new or empty folder, or one drawn before")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="training images (default: %(default)s)")
    parser.add_argument(
        "--val-images", type=int, default=64, metavar="N", help="held-out images (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other images (default: 0)")
    args = parser.parse_args(arguments)
    try:
        folder = Path(args.folder).expanduser()
        draw_dataset(folder, images=args.images, val_images=args.val_images, seed=args.seed)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {args.images} training and {args.val_images} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
