"""Detections on one's own images, which need no annotations: pictures and a list of what was found."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from src.data.batch import normalise
from src.data.coco import Category
from src.data.images import decode, resize
from src.errors import UserError
from src.output import make_folder
from src.precision import autocast
from src.report.plots import draw_prediction
from src.report.report import NullReport, Report
from src.ssd.default_boxes import default_boxes
from src.weights.detector import known_categories, trained_model
from src.weights.files import load_checkpoint

from .evaluate import Detections, detect, evaluating, finite_boxes
from .gallery import warn_of_non_finite
from .scoring import DECIMALS, write_list

SUFFIXES = (".gif", ".jpeg", ".jpg", ".png", ".webp")  # of the images that torchvision decodes
RESULTS = "detections.json"
UNREADABLE_TOLD = 3  # images that are named


class Found(msgspec.Struct):
    """A detection in detections.json: COCO's result format with the names that a reader needs."""

    file_name: str
    image_id: int  # position among the images, from 0
    category_id: int
    category: str
    bbox: list[float]  # x, y, width, height in pixels
    score: float


class Prediction(NamedTuple):
    """What `predict` did."""

    images: int
    unreadable: list[UserError]  # one for each image that could not be read
    detections: int
    non_finite: int  # default boxes of all images whose output was NaN or infinite; they detect nothing


def predict_folder(
    data: Path,
    output: Path,
    *,
    checkpoint: Path,
    backbone: str,
    batch_size: int,
    half: bool,
    device: torch.device,
    report: Report | NullReport,
) -> None:
    """`--mode prediction`: draws and lists what a checkpoint's network detects in an image or a folder of them.

    backbone: that of a checkpoint which does not say.  Raises UserError at the end where images could not be read.
    """
    state = load_checkpoint(checkpoint)
    categories = known_categories(state)
    if data.is_dir() and data.samefile(make_folder(output)):
        raise UserError(f"--output {output} is the images' own folder: what is drawn there would count as images")
    model = trained_model(state, backbone=backbone, num_categories=len(categories), source=checkpoint, device=device)
    done = predict(
        model, find_images(data), categories, output, batch_size=batch_size, device=device, half=half,
        progress=report.progress,
    )  # fmt: skip
    counted = f"{done.images - len(done.unreadable)} images, {done.detections} detections"
    report.note(f"{counted}: pictures and detections.json in {output}")
    warn_of_non_finite(report, done.non_finite)
    if done.unreadable:
        counted = f"{len(done.unreadable)} of {done.images} images left out"
        raise UserError(f"{counted}: {'; '.join(map(str, done.unreadable[:UNREADABLE_TOLD]))}")


def find_images(path: Path) -> list[Path]:
    """The image at `path`, or those in the folder at `path`, sorted by name.

    Raises UserError where there is none; a single file may have any name.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path.absolute()}: no such image or folder")
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not images:
        raise UserError(f"{path.absolute()}: no image in this folder (looked for {', '.join(SUFFIXES)})")
    return images


def predict(
    model: nn.Module,
    images: Sequence[Path],
    categories: Sequence[Category],
    output: Path,
    *,
    batch_size: int,
    device: torch.device,
    half: bool = False,
    progress: Callable[[int, str], AbstractContextManager] | None = None,
) -> Prediction:
    """Draws the detections of each image into `output` (a.jpg gives a.jpg.png) and lists them in detections.json.

    categories: the k-th belongs to label k.  progress: `Report.progress` or the like.
    What is no image is passed over.
    """
    make_folder(output)
    found: list[Found] = []
    unreadable: list[UserError] = []
    non_finite = 0
    progress = progress or NullReport().progress
    with evaluating(model), torch.inference_mode(), progress(len(images), "Prediction") as bar:
        for start, batch in _batches(images, batch_size):
            unreadable += [read for read in batch if isinstance(read, UserError)]
            whole = [(number, *read) for number, read in enumerate(batch, start) if not isinstance(read, UserError)]
            if whole:
                numbers, originals, resized = zip(*whole, strict=True)
                detections, broken = _detect(model, torch.stack(resized), device=device, half=half)
                non_finite += broken
                for number, original, detected in zip(numbers, originals, detections, strict=True):
                    found += _tell(original, detected, images[number], number, categories, output)
            bar.update(len(batch))
    write_list(output / RESULTS, [found] if found else [])
    return Prediction(len(images), unreadable, len(found), non_finite)


def _batches(images: Sequence[Path], batch_size: int) -> Iterator[tuple[int, list[tuple[Tensor, Tensor] | UserError]]]:
    """Position of the first image of a batch, and `_read` of each; the next batch is read meanwhile."""
    with ThreadPoolExecutor() as pool:
        waiting = pool.map(_read, images[:batch_size])
        for start in range(0, len(images), batch_size):
            batch = list(waiting)
            waiting = pool.map(_read, images[start + batch_size : start + 2 * batch_size])
            yield start, batch


def _read(path: Path) -> tuple[Tensor, Tensor] | UserError:
    """The image as it is [3, H, W] and for the network [3, 300, 300], uint8; or why it cannot be read."""
    try:
        image = decode(path)
    except UserError as error:
        return error
    return image, resize(image)


def _detect(model: nn.Module, images: Tensor, *, device: torch.device, half: bool) -> tuple[list[Detections], int]:
    with autocast(device, half):
        offsets, logits = model(normalise(images.to(device)))
    usable = finite_boxes(offsets, logits)
    defaults = default_boxes().to(device)
    return detect(offsets, logits, defaults=defaults, usable=usable), int((~usable).sum())


def _tell(
    image: Tensor, detected: Detections, path: Path, number: int, categories: Sequence[Category], output: Path
) -> list[Found]:
    """Draws one image's detections; gives them as they are listed."""
    height, width = image.shape[1:]
    boxes = detected.boxes.cpu().numpy().astype(np.float64) * (width, height, width, height)
    scores = detected.scores.cpu().numpy()
    chosen = [categories[label - 1] for label in detected.labels.tolist()]
    names = [category.name for category in chosen]
    draw_prediction(image.permute(1, 2, 0).numpy(), boxes, names, scores, output / f"{path.name}.png")
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(chosen, boxes.round(DECIMALS).tolist(), scores.tolist(), strict=True)
    return [Found(path.name, number, category.id, category.name, box, score) for category, box, score in rows]
