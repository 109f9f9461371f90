"""The entries of a COCO file's lists: the fields that are read, with their types and ranges."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from src.data.annotations.coco_errors import LARGEST_ID, LEAST_ID, LONGEST_SIDE

NO_ATTRIBUTES = Raw()

Id = Annotated[int, Meta(ge=LEAST_ID, le=LARGEST_ID)]
Side = Annotated[int, Meta(ge=1, le=LONGEST_SIDE)]
Box = tuple[float, float, float, float]  # x, y, width, height in pixels


class ImageEntry(Struct, gc=False):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    width: Side
    height: Side


class AnnotationEntry(Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: Box
    id: Any = None  # only for messages: other programs write UUIDs and other text
    area: Any = None  # ignored unless it is a number
    iscrowd: int | bool | None = 0
    attributes: Raw = NO_ATTRIBUTES  # CVAT's may hold a rotation of the box


class CategoryEntry(Struct, gc=False):
    id: Id
    name: str


DECODERS: dict[str, msgspec.json.Decoder] = {
    "images": msgspec.json.Decoder(list[ImageEntry]),
    "annotations": msgspec.json.Decoder(list[AnnotationEntry]),
    "categories": msgspec.json.Decoder(list[CategoryEntry]),
}
