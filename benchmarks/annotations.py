"""Starting on a data set of COCO's size: `python -m benchmarks annotations` (Linux only).

Writes an annotation file like COCO's (118,287 images, 860,001 boxes with polygons, about 500 MB), then measures reading
it and the time to a first batch.  Every measurement has a process of its own.
"""

import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from benchmarks.table import cost, figure, limit
from benchmarks.turns import Pair, in_turns
from src.data.annotations.coco import Annotations, read_annotations

IMAGES, BOXES = 118_287, 860_001  # COCO's train2017
SIZE = (640, 480)  # width and height of every image in pixels
CATEGORIES = 80
TURNS = 3
MEGABYTE, GIGABYTE = 1e6, 1e9
WATCH_INTERVAL = 0.02  # seconds

READING_GOAL = 0.1  # of json.load's time
READING_LIMIT = 2.5  # seconds
PEAK_LIMIT, KEPT_LIMIT, WORKER_LIMIT = 1000.0, 100.0, 10.0  # MB
TEN_TIMES_DISK, TEN_TIMES_MEMORY = 12, 8  # GB that must be free
TEN_TIMES_GOAL = 12.0  # times the seconds for COCO's number
TEN_TIMES_LIMIT = 1200.0  # MB

T = TypeVar("T")


class Cost(NamedTuple):
    """What a call takes."""

    seconds: float  # of the processor: the call has one thread, so that a busy machine matters less
    peak: float  # MB that the call adds to the process's own memory at most, without pages of files
    kept: float  # MB that the result keeps resident


def run(*, images: int = IMAGES) -> Iterator[dict]:
    """A row for each cost of reading, and for the first batch of each pipeline."""
    with tempfile.TemporaryDirectory(prefix="ssd300-") as folder:
        file, image_folder = Path(folder) / "instances.json", Path(folder) / "images"
        write_annotation_file(file, images)
        write_images(image_folder, images)
        read = partial(in_new_process, measure, read_annotations, file, image_folder)
        pair = in_turns(lambda: read().seconds, lambda: in_new_process(measure, load_json, file).seconds, TURNS)
        reading = read()
        size = f"{file.stat().st_size / MEGABYTE:.0f} MB of annotations"
        yield cost(f"reading {size}, beside json.load (processor s)", pair, READING_GOAL)
        yield limit("  the same, beside the limit (processor s)", pair.ours, READING_LIMIT)
        yield limit("  memory that it takes at its peak, beside the limit (MB)", reading.peak, PEAK_LIMIT)
        yield limit("  kept, beside the limit (MB)", reading.kept, KEPT_LIMIT)
        growth = in_new_process(worker_growth, file, image_folder)
        yield limit("  a worker's own after one epoch's annotations, beside the limit (MB)", growth, WORKER_LIMIT)
        for pipeline in ("no_dali", "dali"):
            yield figure(f"first batch of {pipeline} (s)", in_new_process(first_batch, pipeline, file, image_folder))
    if images == IMAGES:
        yield from ten_times_rows(pair.ours)


def ten_times_rows(seconds: float, *, images: int = 10 * IMAGES) -> Iterator[dict]:
    """Reading ten times as many images, beside `seconds` for COCO's number; prints a line if there is no room."""
    with tempfile.TemporaryDirectory(prefix="ssd300-") as folder:
        disk, memory = shutil.disk_usage(folder).free / GIGABYTE, available() / GIGABYTE
        if disk < TEN_TIMES_DISK or memory < TEN_TIMES_MEMORY:
            print(f"ten times COCO: left out, {disk:.0f} GB of disk and {memory:.0f} GB of memory are free: it takes "
                  f"{TEN_TIMES_DISK} and {TEN_TIMES_MEMORY}")  # fmt: skip
            return
        file = Path(folder) / "instances.json"
        write_annotation_file(file, images)
        needed = in_new_process(measure, read_annotations, file, file.parent)
    pair = Pair(needed.seconds, seconds, 0.0)
    yield cost("reading ten times COCO, beside COCO (processor s)", pair, TEN_TIMES_GOAL)
    yield limit("  memory that it takes at its peak, beside the limit (MB)", needed.peak, TEN_TIMES_LIMIT)


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """The function's result in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --- measured in processes of their own ------------------------------------------------------------------------------


def measure(function: Callable, *arguments: object) -> Cost:
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:  # at least once, however short the call is
            peak = max(peak, resident("RssAnon"))
            if done.wait(WATCH_INTERVAL):
                return

    before = resident("RssAnon")
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    result = function(*arguments)
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    kept = resident("RssAnon") - before
    del result
    return Cost(seconds, peak - before, kept)


def available() -> float:
    """Bytes of memory that are free (proc_meminfo(5))."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def resident(field: str) -> float:
    """A field of this process's memory, such as RssAnon (resident, without files), in MB (proc_pid_status(5))."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / MEGABYTE


def load_json(file: Path) -> dict:
    return json.loads(file.read_bytes())


def worker_growth(file: Path, image_folder: Path) -> float:
    """MB that a forked process comes to own while it looks up every image as the training set does."""
    annotations = read_annotations(file, image_folder)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    worker = context.Process(target=lambda: sender.send(look_up_all(annotations)))
    worker.start()
    growth = receiver.recv()
    worker.join()
    return growth


def look_up_all(annotations: Annotations) -> float:
    before = private()
    for index in np.random.default_rng(0).permutation(len(annotations)):
        annotations.image_path(index)
        annotations.targets(index)
        tuple(annotations.sizes[index])
    return private() - before


def private() -> float:
    """MB of this process that it shares with no other (proc_pid_smaps(5))."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MEGABYTE


def first_batch(pipeline: str, file: Path, image_folder: Path) -> float:
    """Seconds from the annotations to a batch of 32 images on the CPU, without imports."""
    import torch

    from src.data.pipelines.loaders import LoaderConfig, make_train_loader

    if pipeline == "dali":
        import src.data.pipelines.dali_pipeline  # noqa: F401

    annotations = read_annotations(file, image_folder)
    start = time.perf_counter()
    config = LoaderConfig(batch_size=32, num_workers=2, device=torch.device("cpu"))
    loader = make_train_loader(pipeline, annotations, config)
    loader.set_epoch(0)
    next(iter(loader))
    taken = time.perf_counter() - start
    loader.close()
    return taken


# --- the data set ----------------------------------------------------------------------------------------------------

IMAGE = (
    '{{"license":3,"file_name":"{0:012d}.jpg","coco_url":"http://images.cocodataset.org/train2017/{0:012d}.jpg",'
    f'"height":{SIZE[1]},"width":{SIZE[0]},"date_captured":"2013-11-14 11:18:45",'
    '"flickr_url":"http://farm9.staticflickr.com/8186/{0}_4e622c8349_z.jpg","id":{0}}}'
)
ANNOTATION = (
    '{{"segmentation":[[{polygon}]],"area":{area:.5f},"iscrowd":{crowd},"image_id":{image},'
    '"bbox":[{x:.2f},{y:.2f},{width:.2f},{height:.2f}],"category_id":{category},"id":{id}}}'
)


def image_ids(images: int) -> list[int]:
    return np.random.default_rng(0).choice(6 * images, images, replace=False).tolist()


def write_annotation_file(file: Path, images: int) -> None:
    """Writes COCO's fields in COCO's order, with random values."""
    ids = image_ids(images)
    categories = [{"supercategory": "thing", "id": k, "name": f"thing {k}"} for k in range(1, CATEGORIES + 1)]
    with file.open("w") as stream:
        stream.write('{"info":{"description":"random","year":2017},"licenses":[],"images":[')
        stream.writelines("," * (number > 0) + IMAGE.format(id) for number, id in enumerate(ids))
        stream.write('],"annotations":[')
        stream.writelines("," * (number > 0) + text for number, text in enumerate(annotation_texts(ids)))
        stream.write(f'],"categories":{json.dumps(categories)}}}')


def annotation_texts(ids: list[int]) -> Iterator[str]:
    rng = np.random.default_rng(1)
    count = round(BOXES * len(ids) / IMAGES)
    owners = rng.choice(ids[: round(0.991 * len(ids))], count).tolist()  # the others have no boxes
    polygons = [",".join(f"{value:.2f}" for value in rng.uniform(0, 480, 2 * rng.integers(4, 60))) for _ in range(2000)]
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(SIZE) - sides)
    for number, (image, (x, y, width, height)) in enumerate(
        zip(owners, np.hstack((corners, sides)).tolist(), strict=True)
    ):
        yield ANNOTATION.format(
            polygon=polygons[number % len(polygons)], area=0.6 * width * height, crowd=int(number % 85 == 0),
            image=image, x=x, y=y, width=width, height=height, category=number % CATEGORIES + 1, id=number + 1,
        )  # fmt: skip


def write_images(folder: Path, images: int) -> None:
    """Writes a link to one small image for each image."""
    from PIL import Image

    folder.mkdir()
    picture = folder.with_suffix(".jpg")
    Image.new("RGB", SIZE, "grey").save(picture)
    for image_id in image_ids(images):
        (folder / f"{image_id:012d}.jpg").symlink_to(picture)
