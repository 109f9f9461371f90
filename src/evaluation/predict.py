"""Detections on images without annotations: a picture of each, and a list of all detections.

Shapes: D detections of an image.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from src.data.annotations.coco import Category
from src.data.images.decode import resize
from src.data.images.formats import ImageFiles, decode_any, decode_thumbnail, find_images, read_size
from src.data.pipelines.batch import normalise
from src.evaluation.evaluate import EvaluationConfig, detect_batch, evaluating, log_non_finite, prepare_for_inference
from src.evaluation.results import DECIMALS, in_pixels, write_json_list
from src.report.image_plots import MIN_SCORE, draw_prediction
from src.report.report import RunContext
from src.report.run_folder import DETECTIONS, holds_run
from src.runtime.errors import UserError
from src.runtime.output_files import MAX_KEPT_CHARACTERS, make_folder
from src.ssd.detect import Detections, EndToEndDetector
from src.weights.detector import known_categories
from src.weights.exported import load_trained, trained_detector

SUBFOLDER = "predictions"  # for predictions, in an --output that holds a run
PICTURE_SUFFIX = ".png"  # added to the image's name
MAX_NAME_BYTES = 255  # of a file name on most file systems
MAX_NAMED_ERRORS = 20  # unreadable images that the error names; it counts the rest
MAX_SIDE = 2000  # pixels of a drawn picture; larger images are scaled down
PIXEL_BUDGET = 100_000_000  # pixels decoded at the same time in all threads; a larger image is decoded alone


class DetectionRecord(msgspec.Struct):
    """A detection in detections.json: COCO's result format, and names for people to read."""

    file_name: str  # relative to the images' folder
    image_id: int  # index of the image, from 0
    category_id: int
    category: str
    bbox: list[float]  # left, top, width, height in pixels, inside the image
    score: float


class Prediction(NamedTuple):
    """The outcome of `predict`."""

    images: int
    unreadable: list[UserError]  # one for each image that could not be read
    detections: int
    non_finite: int  # default boxes of all images whose output was NaN or infinite; they detect nothing


def predict_folder(
    data: Path,
    *,
    checkpoint: Path,
    backbone: str,
    config: EvaluationConfig,
    context: RunContext,
    score: float | str | None = None,
) -> None:
    """`--mode prediction`: draws and lists what a checkpoint's network detects in an image or a folder of images.

    backbone: used where the checkpoint does not name its own.  score: see `min_scores_of`.
    Each rank draws its share of the images, rank 0 lists
    all.  Raises UserError at the end, on rank 0, where images could not be read.
    """
    processes, report, output = context.processes, context.report, context.output
    state = processes.broadcast_object(load_trained(checkpoint) if processes.is_main else None)
    categories = known_categories(state)
    min_scores = min_scores_of(state, score, len(categories), source=checkpoint)
    folder, images = processes.broadcast_object(
        (_output_folder(data, output), find_images(data, leave_out=output, marker=DETECTIONS))
        if processes.is_main
        else None
    )
    if folder != output:
        report.note(f"{output} holds a run, whose files stay: the predictions go to {folder}")
    model = trained_detector(
        state, backbone=backbone, num_categories=len(categories), source=checkpoint, device=processes.device
    )
    prediction = predict(model, images, categories, config, RunContext(processes, report, folder), min_scores)
    if prediction is None:
        return
    readable = prediction.images - len(prediction.unreadable)
    others = f"; {images.others} other files passed over" if images.others else ""
    report.note(f"{readable} images, {prediction.detections} detections: pictures and {DETECTIONS} in {folder}{others}")
    if images.marked:
        report.note(f"Folders with {DETECTIONS} left out, as earlier results: {images.marked}")
    log_non_finite(report, prediction.non_finite)
    unreadable = images.unreadable + prediction.unreadable
    if unreadable:
        raise unreadable_images_error(unreadable, prediction.images)


def min_scores_of(state: dict, score: float | str | None, num_categories: int, *, source: Path) -> Tensor | None:
    """The least score of each category's detections, [K]; None without --score.

    score: for all categories; or "best": each category's own as the checkpoint has it, where that is not defined the
    one of all.  Raises UserError for a checkpoint without them.
    """
    if score is None:
        return None
    if isinstance(score, float):
        return torch.full((num_categories,), score)
    thresholds = state.get("score_thresholds") or {"all": None}
    if thresholds["all"] is None:
        raise UserError(
            f"{source}: has no score thresholds, which best.pt has from an evaluation that detects something: give a "
            "number, as --mode evaluation prints them (--score 0.4)"
        )
    return torch.tensor([thresholds["all"] if own is None else own for own in thresholds["by_label"]])


def unreadable_images_error(unreadable: Sequence[UserError], images: int) -> UserError:
    """One line for all images that could not be read.  images: their number, with those that could."""
    named = "; ".join(map(str, unreadable[:MAX_NAMED_ERRORS]))
    more = len(unreadable) - MAX_NAMED_ERRORS
    return UserError(
        f"{len(unreadable)} of {images} images left out: {named}{f'; and {more} more' if more > 0 else ''}"
    )


def _output_folder(data: Path, output: Path) -> Path:
    """Where predictions on `data` go: `output`, or a folder in it where that holds a run or an evaluation.

    Makes the folder.  Raises UserError where it is the folder of the images.
    """
    for folder in (output, output / SUBFOLDER) if holds_run(make_folder(output)) else (output,):
        if os.path.isdir(data) and data.samefile(make_folder(folder)):
            raise UserError(f"--output {output} is the images' own folder: what is drawn there would count as images")
    return folder


def predict(
    model: nn.Module,
    images: ImageFiles,
    categories: Sequence[Category],
    config: EvaluationConfig,
    context: RunContext,
    min_scores: Tensor | None = None,
) -> Prediction | None:
    """Draws each image's detections into `context.output` (a.jpg gives a.jpg.png) and lists them in detections.json.

    model: as for `detect_batch`.  categories: the k-th belongs to label k.  min_scores: of `min_scores_of`.
    An image that cannot be read is left out.  All ranks must call this with the same images; each takes its shard.
    Gives None on all ranks but 0.
    """
    processes, output = context.processes, make_folder(context.output)
    records: list[DetectionRecord] = []
    unreadable: dict[int, UserError] = {}  # by index
    non_finite = 0
    shard = range(processes.rank, len(images.files), processes.world_size)
    with evaluating(model), torch.inference_mode(), context.report.progress(len(shard), "Prediction") as bar:
        network = prepare_for_inference(model, device=processes.device, amp=config.amp)
        for indices, batch in _read_batches(images.files, shard, config.batch_size):
            read = list(zip(indices, batch, strict=True))
            unreadable |= {index: error for index, error in read if isinstance(error, UserError)}
            readable = [(index, image) for index, image in read if isinstance(image, _Image)]
            if readable:
                pixels = torch.stack([image.resized for _, image in readable]).to(processes.device)
                inputs = pixels if isinstance(model, EndToEndDetector) else normalise(pixels)
                detections, not_finite = detect_batch(network, inputs, amp=config.amp)
                non_finite += not_finite
                for (index, image), found in zip(readable, detections, strict=True):
                    path, found = images.files[index], clip_to_image(found)
                    if min_scores is not None:
                        found = _above(found, min_scores)
                    name = path.relative_to(images.folder)
                    picture = make_folder((output / name).parent) / picture_name(path.name)
                    drawn_from = MIN_SCORE if min_scores is None else 0.0
                    _draw(path, found, categories, picture, min_score=drawn_from)
                    records += _records(name.as_posix(), index, image.size, found, categories)
            bar.update(len(batch))
    gathered = processes.gather((records, unreadable, non_finite), long_timeout=True)
    if gathered is None:
        return None
    records = sorted(chain.from_iterable(part for part, _, _ in gathered), key=attrgetter("image_id"))
    unreadable = dict(sorted(chain.from_iterable(part.items() for _, part, _ in gathered)))
    write_json_list(output / DETECTIONS, [records] if records else [])
    non_finite = sum(count for _, _, count in gathered)
    return Prediction(len(images.files), list(unreadable.values()), len(records), non_finite)


def clip_to_image(detections: Detections) -> Detections:
    """The detections with their boxes cut off at the image's edges; without those that lie outside."""
    boxes = detections.boxes.clamp(0, 1)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Detections(boxes[inside], detections.labels[inside], detections.scores[inside])


class _Image(NamedTuple):
    """What is kept of an image until its batch is complete.  Its own pixels would take too much memory."""

    size: tuple[int, int]  # width, height in pixels
    resized: Tensor  # [3, 300, 300] uint8


class PixelBudget:
    """Limits how many pixels threads decode at the same time."""

    def __init__(self, pixels: int) -> None:
        self._total = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Waits until that many pixels are free; they are taken inside the block."""
        pixels = min(pixels, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _read_batches(
    files: Sequence[Path], shard: range, batch_size: int
) -> Iterator[tuple[range, list[_Image | UserError]]]:
    """The indices of a batch and what `_read` gives for each; threads read the next batch at the same time."""
    budget = PixelBudget(PIXEL_BUDGET)
    batches = [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
    with ThreadPoolExecutor() as pool:

        def start_reading(indices: range) -> Iterator[_Image | UserError]:
            return pool.map(lambda index: _read(files[index], budget), indices)

        reading = start_reading(shard[:batch_size])
        for indices, following in zip(batches, [*batches[1:], range(0)], strict=False):
            batch = list(reading)
            reading = start_reading(following)
            yield indices, batch


def _read(path: Path, budget: PixelBudget) -> _Image | UserError:
    """The image as the network takes it, or the reason why it cannot be read."""
    width, height = read_size(path)
    with budget.reserve(width * height):
        try:
            image = decode_any(path)
        except UserError as error:
            return error
        return _Image((image.shape[2], image.shape[1]), resize(image))


def _above(detections: Detections, min_scores: Tensor) -> Detections:
    """The detections with the least score of their category or more; min_scores [K]."""
    kept = detections.scores >= min_scores.to(detections.scores.device)[detections.labels - 1]
    return Detections(*(each[kept] for each in detections))


def _draw(
    path: Path, detections: Detections, categories: Sequence[Category], picture: Path, *, min_score: float
) -> None:
    """Draws an image's detections on it, scaled down to MAX_SIDE."""
    image = decode_thumbnail(path, MAX_SIDE, any_format=True).permute(1, 2, 0).numpy()
    boxes = in_pixels(detections.boxes.cpu().numpy(), image.shape[1::-1])
    names = [categories[label - 1].name for label in detections.labels.tolist()]
    draw_prediction(image, boxes, names, detections.scores.cpu().numpy(), picture, min_score=min_score)


def picture_name(name: str) -> str:
    """The name of an image's picture: a.jpg.png for a.jpg; a name that gets too long is cut and gets a digest."""
    whole = os.fsencode(name)
    if len(whole) + len(PICTURE_SUFFIX) <= MAX_NAME_BYTES:
        return name + PICTURE_SUFFIX
    return f"{name[:MAX_KEPT_CHARACTERS]}.{hashlib.sha256(whole).hexdigest()[:16]}{PICTURE_SUFFIX}"


def _records(
    name: str, index: int, size: tuple[int, int], detections: Detections, categories: Sequence[Category]
) -> list[DetectionRecord]:
    """One image's detections as detections.json lists them."""
    boxes = in_pixels(detections.boxes.cpu().numpy(), size).round(DECIMALS)  # corners first: they stay in the image
    boxes[:, 2:] -= boxes[:, :2]
    detected = [categories[label - 1] for label in detections.labels.tolist()]
    rows = zip(detected, boxes.round(DECIMALS).tolist(), detections.scores.tolist(), strict=True)
    return [DetectionRecord(name, index, category.id, category.name, box, score) for category, box, score in rows]
