"""The DALI graph of a training batch, written once: its operators run on the GPU where there is one.

    read -> draw a window -> decode the window -> resize -> flip
       boxes -> draw a window -> flip -> match to the default boxes

A GPU decodes the whole picture and takes the window of that: nvImageCodec 0.9 fails on windows (its issue 55), and the
JPEG hardware of a GPU decodes whole pictures only.

Colour is drawn here and changed in batch.py, as for the other pipeline: one formula, and on a CPU the faster one.

Shapes: A = 8,732 default boxes, G ground-truth boxes of an image (it varies); a node stands for a batch of samples.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from src.data.pipelines import augment as ssd
from src.runtime.errors import UserError
from src.ssd.default_boxes import IMAGE_SIZE, MATCH_THRESHOLD, default_boxes_ltrb

try:
    import nvidia.dali as dali
    from nvidia.dali import fn, math, types
    from nvidia.dali.data_node import DataNode
except Exception as error:  # absent, no wheel for this system, or a library that does not load
    raise UserError(f"DALI cannot be used here ({str(error).splitlines()[0]}): use --data_pipeline no_dali") from None

PREFETCH = 2  # batches prepared ahead
# Of the graph on each device, counted up when its operators change: what a checkpoint holds belongs to them.
VERSIONS = {"cpu": 2, "cuda": 4}
OUTPUTS = ("images", "boxes", "labels", "ids", "sizes")  # what training takes
AUGMENTED = ("colour",)  # beside them where it augments
ON_GPU = ("ends",)  # and where a GPU decodes, which takes a file that was cut short as if it were whole
FILES = "files"  # the input of `make_decoder`'s pipeline


class Settings(NamedTuple):
    """What a graph is made of, beside the images."""

    batch_size: int
    device_id: int | None  # of the GPU; None: everything on the CPU
    num_threads: int
    augment: bool
    seed: int
    order_seed: int  # the same on every process
    rank: int
    world_size: int
    upright: bool  # pictures are turned as their orientation tags say


def make_pipeline(
    settings: Settings,
    annotations: Path,
    image_folder: Path,
    file_names: list[str] | None,
    *,
    outputs: tuple[str, ...] = OUTPUTS,
    checkpoint: bytes | None = None,
) -> dali.Pipeline:
    """A built pipeline that gives these nodes of the graph, from the start or from where `checkpoint` was taken.

    What no output needs is not run.  Raises RuntimeError where DALI cannot build it.
    """
    pipeline = dali.Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        seed=settings.seed,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # its outputs live as long as the tensors that share their memory
        enable_checkpointing=True,  # always, because without it the order is another
        checkpoint=checkpoint,
    )
    with pipeline:
        nodes = training_graph(settings, annotations, image_folder, file_names)
        pipeline.set_outputs(*(nodes[name] for name in outputs))
    pipeline.build()
    return pipeline


def make_decoder(*, batch_size: int, device_id: int | None, upright: bool) -> dali.Pipeline:
    """A built pipeline that gives the size that training takes a fed file for, [3], and the picture, HWC uint8 RGB."""
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=batch_size, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True
    )
    with pipeline:
        files = fn.external_source(name=FILES, dtype=types.UINT8, ndim=1)
        sizes = fn.peek_image_shape(files, adjust_orientation=upright)
        decode = decode_on_cpu if device_id is None else decode_on_gpu
        pipeline.set_outputs(sizes, decode(files, upright=upright))
    pipeline.build()
    return pipeline


def device_index(device: torch.device) -> int | None:
    """DALI's number of a device; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def cause(error: Exception) -> str:
    """The line of one of DALI's long messages that says what went wrong."""
    lines = [line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()]
    return lines[0].rstrip(" :") if lines else type(error).__name__


def training_graph(settings: Settings, annotations: Path, image_folder: Path, file_names: list[str] | None) -> dict:
    """The graph's nodes by name.

    annotations: the folder of `dali_files.write_reader_files`, and no file_names; or `write_clean_file`'s file, and the
    file names in the order of the first pass over them.
    """
    on_gpu = settings.device_id is not None
    files, boxes, labels, ids = read(settings, annotations, image_folder, file_names)
    sizes = fn.peek_image_shape(files, adjust_orientation=settings.upright)  # [3] height, width, 3
    nodes = {"ids": ids, "sizes": sizes}  # ids: [1]
    anchor = shape = None
    if settings.augment:
        anchor, shape, boxes, labels = random_window(boxes, labels)
        flip = fn.random.coin_flip(probability=ssd.FLIP_PROBABILITY)
        boxes = fn.bb_flip(boxes, horizontal=flip, ltrb=True)
        nodes |= {"anchor": anchor, "shape": shape, "flip": flip}
    nodes["resized"] = images = decode_and_resize(files, anchor, shape, on_gpu=on_gpu, upright=settings.upright)
    if settings.augment:
        images = fn.flip(images, horizontal=flip)
        nodes["colour"] = fn.stack(*(fn.random.uniform(range=limits) for limits in ssd.COLOUR))  # [4]
    nodes |= {"images": images, "true_boxes": boxes, "true_labels": labels}
    nodes["boxes"], nodes["labels"] = match_default_boxes(boxes, labels, on_gpu=on_gpu)
    nodes["ends"] = ends(files)
    return nodes


def read(settings: Settings, annotations: Path, image_folder: Path, file_names: list[str] | None) -> tuple:
    """The next samples of this process: the file's bytes, boxes [G, 4] ltrb in 0..1, labels [G], image id [1].

    Every pass after the first is shuffled anew over all processes.  Each has as many batches, all full: the last is
    filled up with repeats.
    """
    source: dict = {"preprocessed_annotations": str(annotations)}  # whose boxes are ready
    if file_names is not None:
        source = {"annotations_file": str(annotations), "images": file_names, "ltrb": True, "ratio": True}
        source["size_threshold"] = 0.0  # every box: they are clean
    files, boxes, labels, ids = fn.readers.coco(
        name="reader",
        **source,
        file_root=str(image_folder),
        image_ids=True,
        shard_id=settings.rank,
        num_shards=settings.world_size,
        shuffle_after_epoch=True,
        shuffle_after_epoch_seed=settings.order_seed,
        pad_last_batch=True,
    )
    # Rounding takes some boxes 1e-7 beyond the image, which the window operator refuses.
    return files, math.clamp(boxes, 0.0, 1.0), labels, ids


def ends(files: DataNode) -> DataNode:
    """The first two and the last two bytes of each file, [4]."""
    return fn.cat(files[:2], files[-2:])


def random_window(boxes: DataNode, labels: DataNode) -> tuple:
    """A window drawn as by `augment.draw_window`: its corner and its sides, [2] each, x and y in 0..1; the boxes and
    labels that it keeps, in its own coordinates."""
    return fn.random_bbox_crop(
        boxes,
        labels,
        bbox_layout="xyXY",
        thresholds=[max(0.0, least) for least in ssd.CROP_MIN_IOU if least is not ssd.NO_CROP],  # 0: no condition
        allow_no_crop=ssd.NO_CROP in ssd.CROP_MIN_IOU,
        scaling=list(ssd.CROP_SIDE),
        aspect_ratio=list(ssd.CROP_ASPECT),
        num_attempts=1,  # one window for a condition, then another condition
    )


def decode_and_resize(
    files: DataNode, anchor: DataNode | None, shape: DataNode | None, *, on_gpu: bool, upright: bool
) -> DataNode:
    """The window of the picture, or all of it without one, at 300 x 300; HWC uint8 RGB."""
    images = (decode_on_gpu if on_gpu else decode_on_cpu)(files, anchor, shape, upright=upright)
    return fn.resize(images, size=[IMAGE_SIZE, IMAGE_SIZE])


def decode_on_cpu(
    files: DataNode, anchor: DataNode | None = None, shape: DataNode | None = None, *, upright: bool = False
) -> DataNode:
    """The window of the picture, HWC uint8 RGB, of which little more than the window is decoded.

    upright: the window is one of the picture turned by its orientation tag.
    """
    if anchor is None:
        return fn.decoders.image(files, adjust_orientation=upright)
    return fn.decoders.image_slice(files, anchor, shape, adjust_orientation=upright)


def decode_on_gpu(
    files: DataNode,
    anchor: DataNode | None = None,
    shape: DataNode | None = None,
    *,
    upright: bool = False,
    device: str = "mixed",
) -> DataNode:
    """The same pixels, HWC uint8 RGB, cut out of the whole picture.  device: for tests."""
    # Colours smoothed as libjpeg does it, which decodes the images of the evaluation.
    images = fn.decoders.image(files, device=device, adjust_orientation=upright, jpeg_fancy_upsampling=True)
    return images if anchor is None else fn.slice(images, anchor, shape)


def match_default_boxes(boxes: DataNode, labels: DataNode, *, on_gpu: bool) -> tuple:
    """Boxes [A, 4] cxcywh and labels [A] of the default boxes in reverse order, for boxes [G, 4] ltrb and labels [G].

    In reverse, because on equal overlaps the operator takes the last default box, the published model the first.
    """
    if on_gpu:
        boxes, labels = boxes.gpu(), labels.gpu()
    anchors = default_boxes_ltrb().flip(0).flatten().tolist()
    boxes, labels = fn.box_encoder(boxes, labels, anchors=anchors, criteria=MATCH_THRESHOLD)
    return boxes, fn.cast(labels, dtype=types.INT64)
