"""Starting on a data set of COCO's size: `python -m benchmarks.annotations [--images N]`.

Writes an annotation file like COCO's (118,287 images, 860,001 boxes with polygons, about 500 MB) to a temporary place
and measures what is done with it before the first batch.  Every measurement has a process of its own (Linux only).
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from benchmarks import table
from src.data.annotations.coco import Annotations, check_images_exist, read_annotations
from src.data.pipelines.dali_files import write_clean_file

IMAGES, BOXES = 118_287, 860_001  # COCO's train2017
ANNOTATED = 117_266 / IMAGES
CATEGORIES = 80
SIZE = (640, 480)  # pixels, of every image
POINTS = (4, 60)  # of a polygon, the least and one more than the most
POLYGONS = 2000  # different ones
REPEATS = 3

T = TypeVar("T")
MEGABYTE, GIGABYTE = 1e6, 1e9
WATCH_EVERY = 0.02  # s

READING_GOAL = 0.1  # of json.load's time
READING_LIMIT = 2.5  # s
PEAK_LIMIT, KEPT_LIMIT, WORKER_LIMIT = 1000.0, 100.0, 10.0  # MB

TEN_TIMES_DISK, TEN_TIMES_MEMORY = 12, 8  # GB that must be free
TEN_TIMES_GOAL = 12.0  # times the seconds for COCO's number
TEN_TIMES_LIMIT = 1200.0  # MB


class Cost(NamedTuple):
    seconds: float  # of the processor, which one thread has for itself, so that a busy machine matters less
    peak: float  # MB resident, file pages in use included
    kept: float  # MB that the result keeps resident


def run(*, images: int = IMAGES) -> list[dict]:
    """Rows name, ours, yardstick, ratio, goal (greatest ratio), met."""
    with tempfile.TemporaryDirectory(prefix="ssd300-") as folder:
        file, image_folder = Path(folder) / "instances.json", Path(folder) / "images"
        write_annotation_file(file, images)
        write_images(image_folder, images)
        first = in_new_process(cost, read_annotations, file, image_folder)
        whole = in_new_process(cost, load_json, file)
        costs = [first] + [in_new_process(cost, read_annotations, file, image_folder) for _ in range(REPEATS - 1)]
        reading = Cost(*(statistics.median(figures) for figures in zip(*costs, strict=True)))
        size = f"{file.stat().st_size / MEGABYTE:.0f} MB of annotations"
        rows = [
            table.cost(f"reading {size}, beside json.load (processor s)", reading.seconds, whole.seconds, READING_GOAL),
            table.cost("  the same, beside the limit (processor s)", reading.seconds, READING_LIMIT, 1.0),
            table.cost("  at its peak, beside the limit (MB)", reading.peak, PEAK_LIMIT, 1.0),
            table.cost("  kept, beside the limit (MB)", reading.kept, KEPT_LIMIT, 1.0),
            table.cost("  json.load at its peak (MB)", whole.peak),
            table.cost(
                "  a worker's own after one epoch's annotations, beside the limit (MB)",
                in_new_process(worker_growth, file, image_folder),
                WORKER_LIMIT,
                1.0,
            ),
            *start_rows(file, image_folder),
        ]
    return rows + (ten_times_rows(reading.seconds) if images == IMAGES else [])


def ten_times_rows(seconds: float, *, images: int = 10 * IMAGES) -> list[dict]:
    """What reading ten times as many takes, beside `seconds` for COCO's number; a line alone where there is no room."""
    with tempfile.TemporaryDirectory(prefix="ssd300-") as folder:
        disk, memory = shutil.disk_usage(folder).free / GIGABYTE, available() / GIGABYTE
        if disk < TEN_TIMES_DISK or memory < TEN_TIMES_MEMORY:
            print(f"ten times COCO: left out, {disk:.0f} GB of disk and {memory:.0f} GB of memory are free: it takes "
                  f"{TEN_TIMES_DISK} and {TEN_TIMES_MEMORY}")  # fmt: skip
            return []
        file = Path(folder) / "instances.json"
        write_annotation_file(file, images)
        own, needed = in_new_process(own_peak, file)
    return [
        table.cost("reading ten times COCO, beside COCO (processor s)", needed, seconds, TEN_TIMES_GOAL),
        table.cost("  memory of its own at its peak, beside the limit (MB)", own, TEN_TIMES_LIMIT, 1.0),
    ]


def start_rows(file: Path, image_folder: Path) -> list[dict]:
    """What follows reading, up to a pipeline's first batch of 32."""
    steps = in_new_process(step_seconds, file, image_folder)
    rows = [table.cost(name, seconds) for name, seconds in steps.items()]
    for pipeline in ("no_dali", "dali"):
        seconds, peak = in_new_process(first_batch, pipeline, file, image_folder)
        rows += [table.cost(f"first batch of {pipeline} (s)", seconds), table.cost("  at its peak (MB)", peak)]
    return rows


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --- measured in processes of their own ------------------------------------------------------------------------------


def cost(function: Callable, *arguments: object) -> Cost:
    before = resident("VmRSS")
    start = time.process_time()
    result = function(*arguments)
    seconds = time.process_time() - start
    kept = resident("VmRSS") - before
    del result
    return Cost(seconds, resident("VmHWM"), kept)


def own_peak(file: Path) -> tuple[float, float]:
    """MB that reading made this process own at most, pages of files left out, and its seconds of the processor."""
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:  # once at least, however soon the reading is over
            peak = max(peak, resident("RssAnon"))
            if done.wait(WATCH_EVERY):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    read_annotations(file, file.parent)
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    return peak, seconds


def available() -> float:
    """Bytes of memory that can be had (proc_meminfo(5))."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def resident(field: str) -> float:
    """VmRSS, RssAnon (no files) or VmHWM (the most there has been) of this process in MB (proc_pid_status(5))."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / MEGABYTE


def load_json(file: Path) -> dict:
    with file.open() as stream:
        return json.load(stream)


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


def step_seconds(file: Path, image_folder: Path) -> dict[str, float]:
    annotations = read_annotations(file, image_folder)
    start = time.perf_counter()
    check_images_exist(annotations)
    checked = time.perf_counter()
    write_clean_file(annotations, file.with_name("clean.json"))
    return {
        "looking for every image file (s)": checked - start,
        "writing the clean file for DALI (s)": time.perf_counter() - checked,
    }


def first_batch(pipeline: str, file: Path, image_folder: Path) -> tuple[float, float]:
    """Seconds from the annotations to a batch on the CPU, imports left out, and the peak in MB."""
    import torch

    from src.data.pipelines.loaders import LoaderConfig, make_train_loader

    if pipeline == "dali":
        import src.data.pipelines.dali_pipeline  # noqa: F401

    annotations = read_annotations(file, image_folder)
    start = time.perf_counter()
    loader = make_train_loader(
        pipeline, annotations, LoaderConfig(batch_size=32, num_workers=2, device=torch.device("cpu"))
    )
    loader.set_epoch(0)
    next(iter(loader))
    seconds = time.perf_counter() - start
    loader.close()
    return seconds, resident("VmHWM")


# --- the data set ----------------------------------------------------------------------------------------------------


def write_annotation_file(file: Path, images: int) -> None:
    """Writes COCO's fields in COCO's order, with random values."""
    rng = np.random.default_rng(0)
    ids = rng.choice(6 * images, images, replace=False)
    with file.open("w") as stream:
        stream.write('{"info": {"description": "made up","year": 2017},"licenses": [],"images": [')
        stream.writelines(separated(map(image_text, ids.tolist())))
        stream.write('],"annotations": [')
        stream.writelines(separated(annotation_texts(rng, ids)))
        categories = [{"supercategory": "thing", "id": k, "name": f"thing {k}"} for k in range(1, CATEGORIES + 1)]
        stream.write(f'],"categories": {json.dumps(categories)}}}')


def separated(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield "," + text if number else text


def file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def image_text(image_id: int) -> str:
    name, (width, height) = file_name(image_id), SIZE
    return (
        f'{{"license": 3,"file_name": "{name}","coco_url": "http://images.cocodataset.org/train2017/{name}",'
        f'"height": {height},"width": {width},"date_captured": "2013-11-14 11:18:45",'
        f'"flickr_url": "http://farm9.staticflickr.com/8186/{image_id}_4e622c8349_z.jpg","id": {image_id}}}'
    )


def annotation_texts(rng: np.random.Generator, ids: np.ndarray) -> Iterator[str]:
    count = round(BOXES * len(ids) / IMAGES)
    owners = rng.choice(ids[: round(ANNOTATED * len(ids))], count).tolist()
    polygons = [
        ",".join(f"{value:.2f}" for value in rng.uniform(0, 480, 2 * rng.integers(*POINTS))) for _ in range(POLYGONS)
    ]
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    boxes = np.concatenate([rng.uniform(0, 1, (count, 2)) * (np.array(SIZE) - sides), sides], axis=1).tolist()
    for number, (owner, (x, y, width, height)) in enumerate(zip(owners, boxes, strict=True)):
        yield (
            f'{{"segmentation": [[{polygons[number % POLYGONS]}]],"area": {0.6 * width * height:.5f},'
            f'"iscrowd": {int(number % 85 == 0)},"image_id": {owner},"bbox": [{x:.2f},{y:.2f},{width:.2f},'
            f'{height:.2f}],"category_id": {number % CATEGORIES + 1},"id": {number + 1}}}'
        )


def write_images(folder: Path, images: int) -> None:
    """A link to one small picture for each image."""
    from PIL import Image

    folder.mkdir()
    picture = folder.with_suffix(".jpg")
    Image.new("RGB", SIZE, "grey").save(picture)
    for image_id in np.random.default_rng(0).choice(6 * images, images, replace=False).tolist():
        (folder / file_name(image_id)).symlink_to(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES, help="in the file that is written (default: %(default)s)")
    print(table.table(run(images=parser.parse_args().images)))


if __name__ == "__main__":
    main()
