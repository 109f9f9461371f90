"""`--orientation upright`: pictures turned by their EXIF tag, for annotation files that have the turned ones' sizes."""

import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.data.annotations.coco import Annotations, read_annotations
from src.data.images.decode import decode, resize
from src.data.images.exif import apply_orientation, read_orientation
from src.data.images.formats import decode_any
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.loaders import make_train_loader
from src.data.pipelines.torch_pipeline import EvaluationLoader
from src.runtime.errors import DataError
from tests.helpers.both_pipelines import CPU, train_loader
from tests.helpers.datasets import annotation, write_annotations, write_image
from tests.helpers.image_files import chunk
from tests.helpers.small_runs import metrics
from tests.helpers.stopped_runs import idle_run, pipeline_flags

KINDS = [*((tag, "jpg") for tag in range(1, 9)), (6, "png"), (8, "webp")]  # orientation tag and format


def write_turned(folder: Path, kinds=KINDS) -> Path:
    """Pictures with orientation tags; the annotation file has the sizes of the turned ones."""
    images = []
    for number, (tag, suffix) in enumerate(kinds, 1):
        exif = Image.Exif()
        exif[0x0112] = tag
        name = f"{tag}.{suffix}"
        for split in ("train", "val"):
            write_image(folder / f"{split}2017" / name, 160, 120, seed=number, exif=exif)
        width, height = (120, 160) if tag > 4 else (160, 120)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    boxes = [annotation(image["id"], (10, 20, 70, 90), 1 + image["id"] % 2, id=image["id"]) for image in images]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    for split in ("train", "val"):
        write_annotations(folder, content, split)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_turned(tmp_path_factory.mktemp("turned"))


@pytest.fixture(scope="module")
def upright(data) -> Annotations:
    return read_annotations(data / "annotations/instances_train2017.json", data / "train2017", upright=True)


def pillows(path: Path) -> torch.Tensor:
    """The picture turned upright by Pillow, [3, H, W] uint8."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB"))).permute(2, 0, 1)


def test_both_pipelines_turn_pictures_and_not_boxes(pipeline, upright, data, tmp_path):
    """As if the pictures had been stored turned."""
    stored = replace(upright, upright=False, image_folder=tmp_path)
    for index in range(len(upright)):  # with little loss, so that the copies differ little
        Image.fromarray(pillows(upright.image_path(index)).permute(1, 2, 0).numpy()).save(
            tmp_path / stored.file_name(index), lossless=True, quality=100, subsampling=0
        )
    turned, expected = ([*train_loader(pipeline, annotations)] for annotations in (upright, stored))
    assert len(turned) == len(upright)
    for one, other in zip(turned, expected, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
        assert (one.images - other.images).abs().max() < 0.1  # of JPEG's rounding; 1 is 58 grey levels


def test_dalis_windows_are_of_the_turned_picture(upright):
    pytest.importorskip("nvidia.dali")
    loader = train_loader("dali", upright, augment=True, batch_size=len(upright))
    pipeline = loader.build(("ids", "anchor", "shape", "resized"))
    smaller = 0
    for _ in range(6):
        ids, anchors, shapes, images = (output.as_array() for output in pipeline.run())
        for number, anchor, shape, image in zip(ids[:, 0], anchors, shapes, images, strict=True):
            index = int(loader.image_indices[number])
            width, height = upright.sizes[index]
            left, top = np.round(anchor * (width, height)).astype(int)
            right, bottom = np.round((anchor + shape) * (width, height)).astype(int)
            window = pillows(upright.image_path(index))[:, top:bottom, left:right]
            assert (resize(window).permute(1, 2, 0).int() - torch.from_numpy(image)).abs().max() <= 3
            smaller += (bottom - top, right - left) != (height, width)
    assert smaller > 20


def test_the_evaluation_turns_pictures(upright):
    loader = EvaluationLoader(upright, LoaderConfig(batch_size=8, num_workers=0, device=CPU))
    seen = {int(index): image for images, indices in loader for image, index in zip(images, indices, strict=True)}
    assert len(seen) == len(upright)
    straight = EvaluationLoader(replace(upright, upright=False), LoaderConfig(batch_size=8, num_workers=0, device=CPU))
    with pytest.raises(DataError, match=r"--orientation upright reads$"):
        list(straight)


def test_a_size_that_only_the_other_orientation_has_is_an_error_with_a_hint(upright, data, tmp_path):
    entries = json.loads(upright.path.read_text())
    for image in entries["images"]:
        image.update(width=160, height=120)
    path = write_annotations(tmp_path, entries)
    stored = read_annotations(path, data / "train2017")
    for index in range(len(stored)):
        assert torch.equal(read_image(stored, index), decode(stored.image_path(index)))
    index = len(stored) - 1
    with pytest.raises(DataError, match=r"8\.webp: the picture is 160 x 120, but .* width 120, height 160: it is the "
                                        "size of the picture turned by .* --orientation upright reads$"):  # fmt: skip
        read_image(replace(upright, upright=False), index)
    with pytest.raises(DataError, match=r"8\.webp: the picture is 120 x 160, but .* width 160, height 120: it is the "
                                        "stored picture's size, which --orientation stored reads$"):  # fmt: skip
        read_image(replace(stored, upright=True), index)


def test_without_annotations_a_damaged_tag_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (80, 60), "red").save(stream, format="jpeg", exif=exif)
    content = stream.getvalue()
    path = tmp_path / "picture.jpg"
    for damaged in (content.replace(b"MM\0*", b"??\0*"), content.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")):
        assert damaged != content
        path.write_bytes(damaged)
        assert decode_any(path).shape == (3, 60, 80)


# --- unusual tags ----------------------------------------------------------------------------------------------------

PIXELS = np.zeros((24, 40, 3), np.uint8)
PIXELS[:8, :8] = 255  # one white corner tells how it is turned
SHORT, LONG = (3, "H2x"), (4, "I")


def encoded(kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, format=kind, **options)
    return stream.getvalue()


def entry(value: int, kind: tuple[int, str] = SHORT, *, tag: int = 0x0112, count: int = 1, order: str = "<") -> bytes:
    return struct.pack(f"{order}HHI{kind[1]}", tag, kind[0], count, value)


def exif_block(*entries: bytes, order: str = "<", start: int = 8) -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head.ljust(start, b"\0") + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)


def app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def jpeg(*blocks: bytes) -> bytes:
    content = encoded("jpeg", quality=95)
    return content[:2] + b"".join(app1(b"Exif\0\0" + block) for block in blocks) + content[2:]


def png(*chunks: bytes) -> bytes:
    content = encoded("png")
    return content[:33] + b"".join(chunks) + content[33:]


def without_webp_flag(content: bytes) -> bytes:
    return content[:20] + bytes([content[20] & ~8]) + content[21:]


SIX = exif_block(entry(6))
XMP = b'<x tiff:Orientation="6"/>'
USUAL = {
    "none": (encoded("jpeg"), 1),
    "little-endian": (jpeg(SIX), 6),
    "big-endian": (jpeg(exif_block(entry(8, order=">"), order=">")), 8),
    "0": (jpeg(exif_block(entry(0))), 1),
    "behind another tag": (jpeg(exif_block(entry(0x41424344, (2, "I"), tag=0x10F, count=4), entry(3))), 3),
    "elsewhere in the block": (jpeg(exif_block(entry(6), start=27)), 6),
    "no tag": (jpeg(exif_block(entry(40, tag=0x100))), 1),
    "XMP too": (jpeg(SIX)[:2] + app1(b"http://ns.adobe.com/xap/1.0/\0" + XMP) + jpeg(SIX)[2:], 6),
    "fill bytes": (jpeg(SIX).replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1), 6),
    "PNG": (png(chunk(b"eXIf", SIX)), 6),
    "WebP": (encoded("webp", lossless=True, exif=SIX), 6),
}
UNUSUAL = {
    "LONG": (jpeg(exif_block(entry(6, LONG))), "1 values of type 4"),
    "LONG, big-endian": (jpeg(exif_block(entry(6, LONG, order=">"), order=">")), "1 values of type 4"),
    "BYTE": (jpeg(exif_block(entry(6, (1, "B3x")))), "1 values of type 1"),
    "two values": (jpeg(exif_block(entry(6, count=2))), "2 values of type 3"),
    "no value": (jpeg(exif_block(entry(6, count=0))), "0 values of type 3"),
    "9": (jpeg(exif_block(entry(9))), "its value is 9"),
    "twice": (jpeg(exif_block(entry(6), entry(8))), "it occurs 2 times"),
    "two segments": (jpeg(exif_block(entry(40, tag=0x100)), SIX), "2 EXIF blocks"),
    "another tag outside": (jpeg(exif_block(entry(4000, (2, "I"), tag=0x10F, count=400), entry(6))), "another tag"),
    "another tag of no type": (jpeg(exif_block(entry(4000, (77, "I"), tag=0x10F), entry(6))), "another tag"),
    "cut off": (jpeg(SIX[:14]), "cut off"),
    "too many entries": (jpeg(SIX[:8] + struct.pack("<H", 5) + SIX[10:]), "cut off"),
    "no TIFF header": (jpeg(b"??" + SIX[2:]), "no TIFF header"),
    "XMP alone": (jpeg()[:2] + app1(b"http://ns.adobe.com/xap/1.0/\0" + XMP) + jpeg()[2:], "XMP or in a text"),
    "PNG, LONG": (png(chunk(b"eXIf", exif_block(entry(6, LONG)))), "1 values of type 4"),
    "PNG, twice": (png(chunk(b"eXIf", SIX), chunk(b"eXIf", SIX)), "2 EXIF blocks"),
    "PNG, wrong checksum": (png(chunk(b"eXIf", SIX)[:-4] + b"1234"), "checksum"),
    "PNG, named": (png(chunk(b"eXIf", b"Exif\0\0" + SIX)), "no TIFF header"),
    "PNG, as text": (png(chunk(b"tEXt", b"Raw profile type exif\0" + SIX.hex().encode())), "XMP or in a text"),
    "WebP, LONG": (encoded("webp", exif=exif_block(entry(6, LONG))), "1 values of type 4"),
    "WebP, unannounced": (without_webp_flag(encoded("webp", exif=SIX)), "header does not announce it"),
    "WebP, XMP alone": (encoded("webp", xmp=XMP), "XMP or in a text"),
}


@pytest.mark.parametrize("form", UNUSUAL)
def test_an_unusual_tag_is_named_and_refused_everywhere(tmp_path, form):
    content, reason = UNUSUAL[form]
    path = tmp_path / "train2017" / "a"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_orientation(path)
    assert str(raised.value).startswith(f"{path}: its EXIF orientation tag is unusual (") and reason in str(
        raised.value
    )
    images = [{"id": 1, "file_name": "a", "width": 40, "height": 24}]
    boxes = [annotation(1, (2, 2, 9, 9), 1, id=1)]
    write_annotations(tmp_path, {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]})
    annotations = read_annotations(tmp_path / "annotations/instances_train2017.json", path.parent, upright=True)
    config = LoaderConfig(batch_size=1, num_workers=0, device=CPU)
    for use in (
        lambda: read_image(annotations, 0),
        lambda: make_train_loader("no_dali", annotations, config),
        lambda: make_train_loader("dali", annotations, config),
        lambda: EvaluationLoader(annotations, config),
    ):
        with pytest.raises(DataError, match="its EXIF orientation tag is unusual"):
            use()
    stored = replace(annotations, upright=False)
    make_train_loader("no_dali", stored, config).close()
    if "checksum" not in reason:
        assert read_image(stored, 0).shape == (3, 24, 40)


@pytest.mark.parametrize("form", USUAL)
def test_all_decoders_turn_a_usual_tag_alike(tmp_path, form):
    content, orientation = USUAL[form]
    path = tmp_path / "a"
    path.write_bytes(content)
    assert read_orientation(path) == orientation
    picture = apply_orientation(decode(path), orientation)
    assert (picture.int() - pillows(path)).abs().max() <= 2
    pytest.importorskip("nvidia.dali")
    from src.data.pipelines.dali_graph import DECODER_INPUT, make_decoder

    decoder = make_decoder(batch_size=1, device_id=None, upright=True)
    decoder.feed_input(DECODER_INPUT, [np.frombuffer(content, np.uint8)])
    sizes, images = decoder.run()
    assert sizes.as_array()[0].tolist() == [*picture.shape[1:], 3]
    assert (picture.permute(1, 2, 0).int() - torch.from_numpy(np.array(images.at(0)))).abs().max() <= 2


@pytest.mark.usefixtures("tiny_model")
def test_every_mode_applies_the_flag(tmp_path, capsys):
    data = write_turned(tmp_path, [(6, "jpg"), (8, "jpg")])
    assert idle_run(data, tmp_path, *pipeline_flags("no_dali", False), "--evaluation") == (2, 0)
    assert capsys.readouterr().err.endswith("--orientation upright reads\n")
    upright = (*pipeline_flags("no_dali", False), "--orientation", "upright")
    assert idle_run(data, tmp_path, *upright, "--evaluation", "0") == (0, 2)
    assert [entry["kind"] for entry in metrics(tmp_path)].count("evaluation") == 1
    assert idle_run(data, tmp_path / "check", *upright, "--mode", "check") == (0, 0)
