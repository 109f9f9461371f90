"""Labelled pictures as labelling tools leave them, written without the library that reads them."""

import json
from pathlib import Path
from xml.sax.saxutils import escape

from tests.helpers.datasets import write_image

SIZE = (200, 100)  # of every picture drawn here
Boxes = dict[str, list[tuple[int, float, float, float, float]]]  # by picture: category index, left, top, right, bottom


def yolo_line(box: tuple[int, float, float, float, float], size: tuple[int, int] = SIZE) -> str:
    index, left, top, right, bottom = box
    width, height = size
    centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
    return f"{index} {centre[0]:.8f} {centre[1]:.8f} {(right - left) / width:.8f} {(bottom - top) / height:.8f}"


def write_yolo(folder: Path, boxes: Boxes, names: list[str]) -> Path:
    """`images` and `labels` beside each other and a classes.txt; a picture without boxes has no label file."""
    for number, (name, own) in enumerate(boxes.items()):
        write_image(folder / "images" / name, *SIZE, seed=number)
        if own:
            file = (folder / "labels" / name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(map(yolo_line, own)) + "\n")
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder


def voc_text(name: str, boxes: list[tuple], names: list[str], size: tuple[int, int] = SIZE) -> str:
    objects = [
        f"<object>\n<name>{escape(names[index])}</name>\n<bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>\n</object>"
        for index, left, top, right, bottom in boxes
    ]
    head = f"<annotation>\n<filename>{escape(name)}</filename>\n"
    return head + "\n".join(
        [f"<size><width>{size[0]}</width><height>{size[1]}</height></size>", *objects, "</annotation>"]
    )


def write_voc(folder: Path, boxes: Boxes, names: list[str]) -> Path:
    for number, (name, own) in enumerate(boxes.items()):
        write_image(folder / "JPEGImages" / name, *SIZE, seed=number)
        file = (folder / "Annotations" / name).with_suffix(".xml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(voc_text(name, own, names), encoding="utf-8")
    return folder


def write_cvat(folder: Path, boxes: Boxes, names: list[str], subset: dict[str, str] | None = None) -> Path:
    lines = ["<annotations>"]
    for number, (name, own) in enumerate(boxes.items()):
        write_image(folder / "images" / name, *SIZE, seed=number)
        part = f' subset="{subset[name]}"' if subset else ""
        lines.append(f'<image id="{number}" name="{name}"{part} width="{SIZE[0]}" height="{SIZE[1]}">')
        lines += [
            f'<box label="{escape(names[index])}" xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"></box>'
            for index, left, top, right, bottom in own
        ]
        lines.append("</image>")
    (folder / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]), encoding="utf-8")
    return folder


def write_labelme(folder: Path, boxes: Boxes, names: list[str]) -> Path:
    for number, (name, own) in enumerate(boxes.items()):
        write_image(folder / name, *SIZE, seed=number)
        shapes = [
            {"label": names[index], "points": [[right, bottom], [left, top]], "shape_type": "rectangle"}
            for index, left, top, right, bottom in own
        ]
        content = {"imagePath": name, "imageWidth": SIZE[0], "imageHeight": SIZE[1], "imageData": None}
        (folder / name).with_suffix(".json").write_text(json.dumps({**content, "shapes": shapes}))
    return folder


def write_single_coco(folder: Path, boxes: Boxes, names: list[str]) -> Path:
    """One file for all pictures; every second annotation is a crowd with a segmentation."""
    content: dict[str, list[dict]] = {"images": [], "annotations": []}
    for number, (name, own) in enumerate(boxes.items(), 7):
        write_image(folder / "images" / name, *SIZE, seed=number)
        content["images"].append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1], "license": 3})
        for index, left, top, right, bottom in own:
            annotation_id = 40 + len(content["annotations"])
            content["annotations"].append(
                {
                    "id": annotation_id,
                    "image_id": number,
                    "category_id": 10 * (index + 1),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": 12.5,
                    "iscrowd": annotation_id % 2,
                    "segmentation": {"counts": [1, 2], "size": [100, 200]},
                }
            )
    categories = [{"id": 10 * number, "name": name} for number, name in enumerate(names, 1)]
    (folder / "instances_default.json").write_text(json.dumps({**content, "categories": categories}))
    return folder
