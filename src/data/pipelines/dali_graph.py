"""The DALI graph of a training batch, for the CPU and for GPUs.

    files -> decode a random window -> resize -> flip
    boxes -> clip to that window -> flip -> match to the default boxes

On a GPU the whole picture is decoded and then cropped: nvImageCodec 0.9 fails on windows (its issue 55), and the GPU's
JPEG hardware decodes whole pictures only.

The graph draws the colour factors; batch.py changes the colours, as for the other pipeline: one formula, and on a CPU
the faster one.

Shapes: A = 8,732 default boxes, G ground-truth boxes of an image (it varies).  A node holds a batch of samples.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from src.data.pipelines.augment import COLOUR, CROP_ASPECT, CROP_MIN_IOU, CROP_SIDE, FLIP_PROBABILITY, NO_CROP
from src.runtime.errors import UserError
from src.ssd.default_boxes import IMAGE_SIZE, MATCH_THRESHOLD, default_boxes_ltrb

try:
    import nvidia.dali as dali
    from nvidia.dali import fn, math, types
    from nvidia.dali.data_node import DataNode
except Exception as error:  # absent, no wheel for this system, or a library that does not load
    raise UserError(f"DALI cannot be used here ({str(error).splitlines()[0]}): use --data_pipeline no_dali") from None

PREFETCH = 2  # batches prepared ahead
# Of the graph on each device.  Increase it when operators change: a DALI checkpoint is valid for those operators only.
VERSIONS = {"cpu": 2, "cuda": 4}
OUTPUTS = ("images", "boxes", "labels", "ids", "sizes")  # the nodes that training reads
AUGMENTATION_OUTPUTS = ("colour",)  # also read if it augments
GPU_OUTPUTS = ("first_and_last_bytes",)  # also read on a GPU, whose decoder accepts files that were cut short
DECODER_INPUT = "files"  # of `make_decoder`'s pipeline


class Settings(NamedTuple):
    """The configuration of a graph."""

    batch_size: int
    device_id: int | None  # of the GPU; None: the CPU
    num_threads: int
    augment: bool
    seed: int
    order_seed: int  # the same on every process
    rank: int
    world_size: int
    upright: bool  # pictures are turned by their orientation tags


def make_pipeline(
    settings: Settings,
    annotations: Path,
    image_folder: Path,
    file_names: list[str] | None,
    *,
    output_names: tuple[str, ...] = OUTPUTS,
    checkpoint: bytes | None = None,
) -> dali.Pipeline:
    """A built pipeline with these nodes of the graph as outputs, from the start or from the position of `checkpoint`.

    DALI runs only what the outputs need.  Raises RuntimeError if DALI cannot build it.
    """
    pipeline = dali.Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        seed=settings.seed,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,  # keeps outputs alive while tensors share their memory
        enable_checkpointing=True,  # always: without it the order of images differs
        checkpoint=checkpoint,
    )
    with pipeline:
        nodes = training_graph(settings, annotations, image_folder, file_names)
        pipeline.set_outputs(*(nodes[name] for name in output_names))
    pipeline.build()
    return pipeline


def make_decoder(*, batch_size: int, device_id: int | None, upright: bool) -> dali.Pipeline:
    """A built pipeline that gives a fed file's size by its header, [3], and the picture, HWC uint8 RGB."""
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=batch_size, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True
    )
    with pipeline:
        files = fn.external_source(name=DECODER_INPUT, dtype=types.UINT8, ndim=1)
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


def short_reason(error: Exception) -> str:
    """The line of a long DALI message that says what went wrong."""
    lines = [line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()]
    return lines[0].rstrip(" :") if lines else type(error).__name__


def training_graph(settings: Settings, annotations: Path, image_folder: Path, file_names: list[str] | None) -> dict:
    """The graph's nodes by name.

    annotations: the folder of `dali_files.try_write_reader_files`, with file_names None; or the file of
    `write_clean_file`, with the file names in the order of the first epoch.
    """
    on_gpu = settings.device_id is not None
    files, boxes, labels, ids = read_samples(settings, annotations, image_folder, file_names)
    sizes = fn.peek_image_shape(files, adjust_orientation=settings.upright)  # [3] height, width, 3
    nodes = {"ids": ids, "sizes": sizes}  # ids: [1]
    anchor = shape = None
    if settings.augment:
        anchor, shape, boxes, labels = draw_random_window(boxes, labels)
        flip = fn.random.coin_flip(probability=FLIP_PROBABILITY)
        boxes = fn.bb_flip(boxes, horizontal=flip, ltrb=True)
        nodes |= {"anchor": anchor, "shape": shape, "flip": flip}
    nodes["resized"] = images = decode_and_resize(files, anchor, shape, on_gpu=on_gpu, upright=settings.upright)
    if settings.augment:
        images = fn.flip(images, horizontal=flip)
        nodes["colour"] = fn.stack(*(fn.random.uniform(range=limits) for limits in COLOUR))  # [4]
    nodes |= {"images": images, "true_boxes": boxes, "true_labels": labels}
    nodes["boxes"], nodes["labels"] = match_default_boxes(boxes, labels, on_gpu=on_gpu)
    nodes["first_and_last_bytes"] = first_and_last_bytes(files)
    return nodes


def read_samples(settings: Settings, annotations: Path, image_folder: Path, file_names: list[str] | None) -> tuple:
    """The next samples of this process: the file's bytes, boxes [G, 4] ltrb in 0..1, labels [G], image id [1].

    Every epoch after the first is shuffled over all processes.  All processes get the same number of full batches: the
    last one is padded with repeated images.
    """
    source: dict = {"preprocessed_annotations": str(annotations)}
    if file_names is not None:
        source = {"annotations_file": str(annotations), "images": file_names, "ltrb": True, "ratio": True}
        source["size_threshold"] = 0.0  # no box is too small: they are cleaned already
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
    # Rounding moves some boxes 1e-7 beyond the image, which `random_bbox_crop` refuses.
    return files, math.clamp(boxes, 0.0, 1.0), labels, ids


def first_and_last_bytes(files: DataNode) -> DataNode:
    """The first two and the last two bytes of a file, [4] uint8."""
    return fn.cat(files[:2], files[-2:])


def draw_random_window(boxes: DataNode, labels: DataNode) -> tuple:
    """A window as from `augment.draw_window`, and the boxes and labels that it keeps, relative to the window.

    The window is its corner and its sides, [2] each, x and y in 0..1.
    """
    return fn.random_bbox_crop(
        boxes,
        labels,
        bbox_layout="xyXY",
        thresholds=[max(0.0, iou) for iou in CROP_MIN_IOU if iou is not NO_CROP],  # 0: no condition
        allow_no_crop=NO_CROP in CROP_MIN_IOU,
        scaling=list(CROP_SIDE),
        aspect_ratio=list(CROP_ASPECT),
        num_attempts=1,  # windows to draw before it chooses another condition
    )


def decode_and_resize(
    files: DataNode, anchor: DataNode | None, shape: DataNode | None, *, on_gpu: bool, upright: bool
) -> DataNode:
    """The window of the picture, or the whole picture if `anchor` is None, at 300 x 300; HWC uint8 RGB."""
    images = (decode_on_gpu if on_gpu else decode_on_cpu)(files, anchor, shape, upright=upright)
    return fn.resize(images, size=[IMAGE_SIZE, IMAGE_SIZE])


def decode_on_cpu(
    files: DataNode, anchor: DataNode | None = None, shape: DataNode | None = None, *, upright: bool = False
) -> DataNode:
    """The window of the picture, HWC uint8 RGB; decodes little more than the window.

    upright: the picture is turned by its orientation tag; the window applies to the turned picture.
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
    """As `decode_on_cpu`, but cropped from the whole decoded picture.  device: for tests."""
    # Fancy upsampling of chroma, as in libjpeg, which decodes the images of an evaluation.
    images = fn.decoders.image(files, device=device, adjust_orientation=upright, jpeg_fancy_upsampling=True)
    return images if anchor is None else fn.slice(images, anchor, shape)


def match_default_boxes(boxes: DataNode, labels: DataNode, *, on_gpu: bool) -> tuple:
    """Boxes [A, 4] cxcywh and labels [A] of the default boxes in reverse order, for boxes [G, 4] ltrb and labels [G].

    In reverse, because among equal overlaps the operator takes the last default box, and the published model the first.
    """
    if on_gpu:
        boxes, labels = boxes.gpu(), labels.gpu()
    anchors = default_boxes_ltrb().flip(0).flatten().tolist()
    boxes, labels = fn.box_encoder(boxes, labels, anchors=anchors, criteria=MATCH_THRESHOLD)
    return boxes, fn.cast(labels, dtype=types.INT64)
