"""Detections on one's own images, which need no annotations: pictures and a list of what was found."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from src.data.annotations.coco import Category
from src.data.images.decode import resize
from src.data.images.formats import decode_any, decode_thumbnail, find_images, size_of
from src.data.pipelines.batch import normalise
from src.evaluation.artifacts import warn_of_non_finite
from src.evaluation.evaluate import evaluating, find, prepare_for_inference
from src.evaluation.scoring import DECIMALS, write_list
from src.report.plots import draw_prediction
from src.report.report import RESULTS, NullReport, Report, holds_run
from src.runtime.distributed import Processes
from src.runtime.errors import UserError
from src.runtime.output_files import NAME_KEPT, make_folder
from src.ssd.detect import Detections, EndToEndDetector
from src.weights.detector import known_categories
from src.weights.exported import load_trained, trained_detector

SUBFOLDER = "predictions"  # of a run's folder, whose own files stay
SUFFIX = ".png"  # of a picture, behind its image's name
LONGEST_NAME = 255  # bytes of a file's name, on most file systems
UNREADABLE_TOLD = 20  # images that are named
LONGEST_SIDE = 2000  # pixels of a picture that is drawn; larger images are made smaller
DECODED_AT_ONCE = 100_000_000  # pixels, in all threads together; a larger image is decoded while no other is


class Found(msgspec.Struct):
    """A detection in detections.json: COCO's result format with the names that a reader needs."""

    file_name: str  # from the images' folder on
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
    processes: Processes,
    report: Report | NullReport,
) -> None:
    """`--mode prediction`: draws and lists what a checkpoint's network detects in an image or a folder of them.

    backbone: that of a checkpoint which does not say.  Each process draws its share of the images, rank 0 lists all.
    Raises UserError at the end, on rank 0, where images could not be read.
    """
    state = processes.broadcast_object(load_trained(checkpoint) if processes.is_main else None)
    categories = known_categories(state)
    own_output, images = processes.broadcast_object(
        (_output_folder(data, output), find_images(data, leave_out=output)) if processes.is_main else None
    )
    device = processes.device
    if own_output != output:
        report.note(f"{output} holds a run, whose files stay: the predictions go to {own_output}")
    model = trained_detector(state, backbone=backbone, num_categories=len(categories), source=checkpoint, device=device)
    done = predict(
        model, images.files, categories, own_output, batch_size=batch_size, device=device, half=half,
        folder=images.folder, progress=report.progress, dist=processes,
    )  # fmt: skip
    if done is None:
        return
    counted = f"{done.images - len(done.unreadable)} images, {done.detections} detections"
    others = f"; {images.others} other files passed over" if images.others else ""
    report.note(f"{counted}: pictures and {RESULTS} in {own_output}{others}")
    warn_of_non_finite(report, done.non_finite)
    unreadable = images.unreadable + done.unreadable
    if unreadable:
        raise _left_out(unreadable, done.images)


def _left_out(unreadable: Sequence[UserError], images: int) -> UserError:
    """One line for all that could not be read, of so many images."""
    told = "; ".join(map(str, unreadable[:UNREADABLE_TOLD]))
    more = len(unreadable) - UNREADABLE_TOLD
    return UserError(f"{len(unreadable)} of {images} images left out: {told}{f'; and {more} more' if more > 0 else ''}")


def _output_folder(data: Path, output: Path) -> Path:
    """Where predictions on `data` go: `output`, or a folder in it where that holds a run or an evaluation.

    Makes the folder.  Raises UserError, also where what is drawn would lie among the images.
    """
    for folder in (output, output / SUBFOLDER) if holds_run(make_folder(output)) else (output,):
        if data.is_dir() and data.samefile(make_folder(folder)):
            raise UserError(f"--output {output} is the images' own folder: what is drawn there would count as images")
    return folder


def predict(
    model: nn.Module,
    images: Sequence[Path],
    categories: Sequence[Category],
    output: Path,
    *,
    batch_size: int,
    device: torch.device,
    half: bool = False,
    folder: Path | None = None,
    progress: Callable[[int, str], AbstractContextManager] | None = None,
    dist: Processes | None = None,
) -> Prediction | None:
    """Draws the detections of each image into `output` (a.jpg gives a.jpg.png) and lists them in detections.json.

    model: as for `find`.
    categories: the k-th belongs to label k.  folder: which the images are in or below, and from which on they are
    named; left out, their names are the files'.  progress: `Report.progress` or the like.
    An image that cannot be read is left out.  dist: every process of it must call this, with the same images; each
    takes its share.  Gives None on all but rank 0.
    """
    dist = dist or Processes.single(device)
    make_folder(output)
    found: list[Found] = []
    unreadable: dict[int, UserError] = {}  # by position
    non_finite = 0
    progress = progress or NullReport().progress
    share = range(dist.rank, len(images), dist.world_size)
    with evaluating(model), torch.inference_mode(), progress(len(share), "Prediction") as bar:
        network = prepare_for_inference(model, device=device, half=half)
        for start, batch in _batches([images[number] for number in share], batch_size):
            read_ones = list(zip(share[start:], batch, strict=False))
            unreadable |= {number: read for number, read in read_ones if isinstance(read, UserError)}
            whole = [(number, *read) for number, read in read_ones if not isinstance(read, UserError)]
            if whole:
                numbers, sizes, resized = zip(*whole, strict=True)
                pixels = torch.stack(resized).to(device)
                inputs = pixels if isinstance(model, EndToEndDetector) else normalise(pixels)
                detections, broken = find(network, inputs, device=device, half=half)
                non_finite += broken
                for number, size, detected in zip(numbers, sizes, detections, strict=True):
                    path = images[number]
                    name = path.name if folder is None else path.relative_to(folder).as_posix()
                    picture = make_folder((output / name).parent) / picture_name(path.name)
                    _draw(path, size, detected, categories, picture)
                    found += _listed(name, number, size, detected, categories)
            bar.update(len(batch))
    gathered = dist.gather_arrays((found, unreadable, non_finite))
    if gathered is None:
        return None
    found = sorted(chain.from_iterable(part for part, _, _ in gathered), key=attrgetter("image_id"))
    unreadable = dict(sorted(chain.from_iterable(part.items() for _, part, _ in gathered)))
    write_list(output / RESULTS, [found] if found else [])
    non_finite = sum(count for _, _, count in gathered)
    return Prediction(len(images), list(unreadable.values()), len(found), non_finite)


class _Read(NamedTuple):
    """What is kept of an image until its batch is complete; the picture itself, which may be large, is not."""

    size: tuple[int, int]  # width, height in pixels
    resized: Tensor  # [3, 300, 300] uint8


class _Room:
    """Lets threads decode at the same time as much as memory is to hold."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Waits until so many pixels are free; they are taken for the block."""
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _batches(images: Sequence[Path], batch_size: int) -> Iterator[tuple[int, list[_Read | UserError]]]:
    """Position of the first image of a batch, and `_read` of each; the next batch is read meanwhile."""
    room = _Room(DECODED_AT_ONCE)
    with ThreadPoolExecutor() as pool:
        waiting = pool.map(lambda path: _read(path, room), images[:batch_size])
        for start in range(0, len(images), batch_size):
            batch = list(waiting)
            following = images[start + batch_size : start + 2 * batch_size]
            waiting = pool.map(lambda path: _read(path, room), following)
            yield start, batch


def _read(path: Path, room: _Room) -> _Read | UserError:
    """The image as the network gets it; or why it cannot be read."""
    width, height = size_of(path)
    with room.taken(width * height):
        try:
            image = decode_any(path)
        except UserError as error:
            return error
        return _Read((image.shape[2], image.shape[1]), resize(image))


def _draw(
    path: Path, size: tuple[int, int], detected: Detections, categories: Sequence[Category], picture: Path
) -> None:
    """Draws one image's detections; size: its width and height, larger than those of what is drawn perhaps."""
    image = decode_thumbnail(path, LONGEST_SIDE, own=True).permute(1, 2, 0).numpy()
    names = [categories[label - 1].name for label in detected.labels.tolist()]
    draw_prediction(image, _in_pixels(detected, image.shape[1::-1]), names, detected.scores.cpu().numpy(), picture)


def _in_pixels(detected: Detections, size: tuple[int, ...]) -> np.ndarray:
    """Boxes ltrb in an image of that width and height; [D, 4]."""
    return detected.boxes.cpu().numpy().astype(np.float64) * (*size, *size)


def picture_name(name: str) -> str:
    """Of an image's picture: a.jpg.png of a.jpg; where that is too long, the name's beginning and a digest of it."""
    whole = os.fsencode(name)
    if len(whole) + len(SUFFIX) <= LONGEST_NAME:
        return name + SUFFIX
    return f"{name[:NAME_KEPT]}.{hashlib.sha256(whole).hexdigest()[:16]}{SUFFIX}"


def _listed(
    name: str, number: int, size: tuple[int, int], detected: Detections, categories: Sequence[Category]
) -> list[Found]:
    """One image's detections as they stand in detections.json."""
    boxes = _in_pixels(detected, size)
    boxes[:, 2:] -= boxes[:, :2]
    chosen = [categories[label - 1] for label in detected.labels.tolist()]
    rows = zip(chosen, boxes.round(DECIMALS).tolist(), detected.scores.tolist(), strict=True)
    return [Found(name, number, category.id, category.name, box, score) for category, box, score in rows]
