"""`--mode prediction`: detections on images without annotations, drawn on each image and listed in one file.

Shapes: D detections of an image, K categories.
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
from src.evaluation.results import DECIMALS, scale_boxes, write_json_list
from src.report.image_plots import MIN_SCORE, draw_prediction
from src.report.report import RunContext
from src.report.run_folder import DETECTIONS, holds_run
from src.runtime.errors import UserError
from src.runtime.output_files import MAX_KEPT_CHARACTERS, make_folder
from src.ssd.detect import Detections, EndToEndDetector
from src.weights.detector import known_categories
from src.weights.exported import build_trained_detector, load_checkpoint_or_export

SUBFOLDER = "predictions"  # in an --output that holds a run
PICTURE_SUFFIX = ".png"  # appended to the image's name
MAX_NAME_BYTES = 255  # of a file name on most file systems
MAX_NAMED_ERRORS = 20  # unreadable images and folders that the error names; it counts the others
MAX_SIDE = 2000  # pixels of a drawn picture; larger images are scaled down
PIXEL_BUDGET = 100_000_000  # pixels that all threads decode at the same time; a larger image is decoded alone


class DetectionRecord(msgspec.Struct):
    """A detection in detections.json: COCO's results format with names in addition."""

    file_name: str  # relative to --data
    image_id: int  # index of the image in --data, from 0
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
    """Draws and lists the detections of a checkpoint's network in an image or a folder of images.

    backbone: for a checkpoint that names none.  score: see `resolve_min_scores`.
    Each rank draws some of the images, rank 0 lists all.  At the end rank 0 raises UserError if images were unreadable.
    """
    processes, report, output = context.processes, context.report, context.output
    state = processes.broadcast_object(load_checkpoint_or_export(checkpoint) if processes.is_main else None)
    categories = known_categories(state)
    min_scores = resolve_min_scores(state, score, len(categories), source=checkpoint)
    folder, images = processes.broadcast_object(
        (_output_folder(data, output), find_images(data, leave_out=output, marker=DETECTIONS))
        if processes.is_main
        else None
    )
    if folder != output:
        report.note(f"{output} holds a run, whose files stay: the predictions go to {folder}")
    model = build_trained_detector(
        state, backbone=backbone, num_categories=len(categories), source=checkpoint, device=processes.device
    )
    prediction = predict(model, images, categories, config, RunContext(processes, report, folder), min_scores)
    if prediction is None:
        return
    readable = prediction.images - len(prediction.unreadable)
    others = f"; {images.others} other files skipped" if images.others else ""
    report.note(f"{readable} images, {prediction.detections} detections: pictures and {DETECTIONS} in {folder}{others}")
    if images.marked:
        report.note(f"Folders with {DETECTIONS} left out, as earlier results: {images.marked}")
    log_non_finite(report, prediction.non_finite)
    if prediction.unreadable or images.unreadable:
        raise unreadable_error(prediction.unreadable, prediction.images, folders=images.unreadable)


def resolve_min_scores(state: dict, score: float | str | None, num_categories: int, *, source: Path) -> Tensor | None:
    """The lowest score of each category's detections, [K]; None without --score.

    score: the value for all categories, or "best": each category's threshold in the checkpoint, or the one of all
    categories if its own is not defined.  Raises UserError if the checkpoint has no thresholds.
    """
    if score is None:
        return None
    if isinstance(score, float):
        return torch.full((num_categories,), score)
    thresholds = state.get("score_thresholds") or {"all": None}
    if thresholds["all"] is None:
        raise UserError(
            f"{source}: has no score thresholds (best.pt has them after an evaluation with detections): give a number "
            "(--score 0.4); --mode evaluation prints the best ones"
        )
    return torch.tensor([thresholds["all"] if own is None else own for own in thresholds["by_label"]])


def unreadable_error(unreadable: Sequence[UserError], images: int, *, folders: Sequence[UserError]) -> UserError:
    """One line for all unreadable images and folders.  images: the number of all images, readable or not."""
    errors = [*folders, *unreadable]
    named = "; ".join(map(str, errors[:MAX_NAMED_ERRORS]))
    more = len(errors) - MAX_NAMED_ERRORS
    left_out = f"{len(unreadable)} of {images} images left out"
    left_out += f", unreadable folders: {len(folders)}" if folders else ""
    return UserError(f"{left_out}: {named}{f'; and {more} more' if more > 0 else ''}")


def _output_folder(data: Path, output: Path) -> Path:
    """Makes and returns the folder of the predictions: `output`, or SUBFOLDER in it if it holds a run or an evaluation.

    Raises UserError if that is the folder of the images.
    """
    for folder in (output, output / SUBFOLDER) if holds_run(make_folder(output)) else (output,):
        if os.path.isdir(data) and data.samefile(make_folder(folder)):
            raise UserError(f"--output {output} is the folder of the images: predictions there would count as images")
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

    model: as for `detect_batch`.  categories: the k-th has label k.  min_scores: [K], see `resolve_min_scores`.
    Unreadable images are left out.  All ranks must call this with the same images; each takes its shard.  Rank 0 gets
    the outcome, the others None.
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
            readable = {index: image for index, image in read if isinstance(image, _Image)}
            detections, not_finite = _detect(network, list(readable.values()), processes.device, amp=config.amp)
            non_finite += not_finite
            for (index, image), found in zip(readable.items(), detections, strict=True):
                kept = _filter_by_score(clip_to_image(found), min_scores)
                path = images.files[index]
                name = path.relative_to(images.folder)
                picture = make_folder((output / name).parent) / picture_name(path.name)
                drawn_score = MIN_SCORE if min_scores is None else 0.0
                _draw_picture(path, kept, categories, picture, min_score=drawn_score)
                records += _to_records(name.as_posix(), index, image.size, kept, categories)
            bar.update(len(batch))
    gathered = processes.gather((records, unreadable, non_finite), long_timeout=True)
    if gathered is None:
        return None
    records = sorted(chain.from_iterable(part for part, _, _ in gathered), key=attrgetter("image_id"))
    unreadable = dict(sorted(chain.from_iterable(part.items() for _, part, _ in gathered)))
    write_json_list(output / DETECTIONS, [records] if records else [])
    non_finite = sum(count for _, _, count in gathered)
    return Prediction(len(images.files), list(unreadable.values()), len(records), non_finite)


def _detect(
    network: nn.Module, images: list["_Image"], device: torch.device, *, amp: bool
) -> tuple[list[Detections], int]:
    """The outcome of `detect_batch` on any number of images."""
    if not images:
        return [], 0
    pixels = torch.stack([image.resized for image in images]).to(device)
    inputs = pixels if isinstance(network, EndToEndDetector) else normalise(pixels)
    return detect_batch(network, inputs, amp=amp)


def clip_to_image(detections: Detections) -> Detections:
    """The detections with their boxes clipped to the image, without boxes that lie outside it."""
    boxes = detections.boxes.clamp(0, 1)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Detections(boxes[inside], detections.labels[inside], detections.scores[inside])


class _Image(NamedTuple):
    """An image of a batch.  It keeps no pixels of the original, which would take too much memory."""

    size: tuple[int, int]  # width and height of the original in pixels
    resized: Tensor  # [3, 300, 300] uint8


class PixelBudget:
    """Limits how many pixels threads decode at the same time."""

    def __init__(self, pixels: int) -> None:
        self._total = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Waits until that many pixels are free; inside the block they are in use."""
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
    """Batches as indices and the outcomes of `_read_image`; threads read the next batch at the same time."""
    budget = PixelBudget(PIXEL_BUDGET)
    batches = [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
    with ThreadPoolExecutor() as pool:

        def start_reading(indices: range) -> Iterator[_Image | UserError]:
            return pool.map(lambda index: _read_image(files[index], budget), indices)

        reading = start_reading(shard[:batch_size])
        for indices, following in zip(batches, [*batches[1:], range(0)], strict=False):
            batch = list(reading)
            reading = start_reading(following)
            yield indices, batch


def _read_image(path: Path, budget: PixelBudget) -> _Image | UserError:
    """The image, resized for the network, or the error that names why it is unreadable."""
    width, height = read_size(path)
    with budget.reserve(width * height):
        try:
            image = decode_any(path)
        except UserError as error:
            return error
        return _Image((image.shape[2], image.shape[1]), resize(image))


def _filter_by_score(detections: Detections, min_scores: Tensor | None) -> Detections:
    """The detections that reach the score of their category.  min_scores: [K]; None: all detections."""
    if min_scores is None:
        return detections
    kept = detections.scores >= min_scores.to(detections.scores.device)[detections.labels - 1]
    return Detections(*(each[kept] for each in detections))


def _draw_picture(
    path: Path, detections: Detections, categories: Sequence[Category], picture: Path, *, min_score: float
) -> None:
    """Draws the detections on the image, which is scaled down to MAX_SIDE, and writes the picture."""
    image = decode_thumbnail(path, MAX_SIDE, any_format=True).permute(1, 2, 0).numpy()
    boxes = scale_boxes(detections.boxes.cpu().numpy(), image.shape[1::-1])
    names = [categories[label - 1].name for label in detections.labels.tolist()]
    draw_prediction(image, boxes, names, detections.scores.cpu().numpy(), picture, min_score=min_score)


def picture_name(name: str) -> str:
    """The name of an image's picture: a.jpg.png for a.jpg; a name that gets too long is cut and gets a digest."""
    encoded = os.fsencode(name)
    if len(encoded) + len(PICTURE_SUFFIX) <= MAX_NAME_BYTES:
        return name + PICTURE_SUFFIX
    return f"{name[:MAX_KEPT_CHARACTERS]}.{hashlib.sha256(encoded).hexdigest()[:16]}{PICTURE_SUFFIX}"


def _to_records(
    name: str, index: int, size: tuple[int, int], detections: Detections, categories: Sequence[Category]
) -> list[DetectionRecord]:
    """An image's detections as records.  name: its path relative to --data.  index: its image_id."""
    # Corners are rounded before they become width and height, so that boxes stay inside the image.
    boxes = scale_boxes(detections.boxes.cpu().numpy(), size).round(DECIMALS)
    boxes[:, 2:] -= boxes[:, :2]
    detected = [categories[label - 1] for label in detections.labels.tolist()]
    rows = zip(detected, boxes.round(DECIMALS).tolist(), detections.scores.tolist(), strict=True)
    return [DetectionRecord(name, index, category.id, category.name, box, score) for category, box, score in rows]
