"""The weights and categories of a trained detector, from a checkpoint of this program or a published one."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from src.data.annotations.coco import Annotations, Category, read_annotations
from src.runtime.errors import UserError
from src.ssd.default_boxes import BOXES_PER_CELL
from src.ssd.model import SSD300
from src.weights.files import check_fit

CLASSIFICATION_HEADS = "conf."  # prefix of their parameter names


def build_trained_model(
    state: dict, *, backbone: str, num_categories: int, source: Path, device: torch.device
) -> SSD300:
    """A checkpoint's network on the device, channels last.

    backbone: used if the checkpoint names none, as published ones do.  Raises UserError if the weights do not fit.
    """
    model = SSD300(state.get("backbone", backbone), num_categories + 1)
    load_weights(model, state["model"], source=source, new_classification_heads=False)
    return model.to(device).to(memory_format=torch.channels_last)


def load_weights(model: nn.Module, weights: dict[str, Tensor], *, source: Path, new_classification_heads: bool) -> None:
    """Loads `weights` into the network.

    With `new_classification_heads` those heads keep their initial weights.  Raises UserError, which names the first
    parameter that does not fit and both shapes.
    """
    expected = model.state_dict()
    if new_classification_heads:
        heads = {name: tensor for name, tensor in expected.items() if name.startswith(CLASSIFICATION_HEADS)}
        weights = {
            name: tensor for name, tensor in weights.items() if not name.startswith(CLASSIFICATION_HEADS)
        } | heads
    check_fit(expected, weights, source=source)
    model.load_state_dict(weights)


def check_finite(weights: dict[str, Tensor], *, source: Path) -> None:
    """Raises UserError, which names the first one, if parameters or batch-norm statistics are not finite."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity: take a checkpoint from before the run broke down")


def load_detector(model: nn.Module, state: dict, categories: Sequence[Category], *, source: Path) -> list[str]:
    """Loads a checkpoint's weights to start training from them; returns lines to print.

    If the checkpoint has other categories, the classification heads keep their initial weights.  Raises UserError if
    the weights do not fit or are not finite.
    """
    difference = _describe_difference(state, categories)
    load_weights(model, state["model"], source=source, new_classification_heads=difference is not None)
    check_finite(state["model"], source=source)
    if difference is None:
        return []
    return [
        f"{source}: its categories are not the data's ({difference}): backbone, extra blocks and localisation heads "
        "are loaded, the classification heads start afresh"
    ]


def _describe_difference(state: dict, categories: Sequence[Category]) -> str | None:
    """How a checkpoint's categories differ from these, for a message; None if they do not.

    Compares names and order, or only the number if the checkpoint names no categories.
    """
    names = label_names(state)
    there, here = count_labels(state["model"]) - 1, len(categories)
    if names is None:
        return f"{there} there, {here} here" if there != here else None
    return describe_first_difference([*map(repr, names)], [repr(category.name) for category in categories])


def describe_first_difference(there: Sequence[str], here: Sequence[str]) -> str | None:
    """The first label whose category differs between two lists, for a message; None if they are equal."""
    for label, (one, other) in enumerate(zip_longest(there, here, fillvalue="nothing"), 1):
        if one != other:
            return f"label {label} is {one} there and {other} here"
    return None


def count_labels(weights: dict[str, Tensor]) -> int:
    """The number of labels with the background, from the classification heads' shape; 0 if there are no heads."""
    bias = weights.get(f"{CLASSIFICATION_HEADS}0.bias")
    return 0 if bias is None else bias.numel() // BOXES_PER_CELL[0]


def label_names(state: dict) -> list[str] | None:
    """The names of a checkpoint's labels from 1 on; None if it has no names.

    A published checkpoint may have them as `label_map`: label -> name.
    """
    if "categories" in state:
        return [name for _, name in state["categories"]]
    label_map = state.get("label_map")
    labels = range(1, count_labels(state["model"]))
    if isinstance(label_map, dict) and all(isinstance(label_map.get(label), str) for label in labels):
        return [label_map[label] for label in labels]
    return None


def known_categories(state: dict) -> tuple[Category, ...]:
    """The categories of a checkpoint's labels.

    A published checkpoint has no category ids: its labels serve as ids, and "label 1" and so on as missing names.
    """
    if "categories" in state:
        return tuple(Category(*category) for category in state["categories"])
    names = label_names(state) or [f"label {label}" for label in range(1, count_labels(state["model"]))]
    return tuple(Category(label, name) for label, name in enumerate(names, 1))


def read_labelled(path: Path, image_folder: Path, state: dict, *, source: Path, upright: bool = False) -> Annotations:
    """A validation file's annotations with the checkpoint's labels.

    A published checkpoint is assumed to have the file's categories in the file's order.  upright: see
    `read_annotations`.  Raises DataError or UserError if the file has other categories than the checkpoint.
    """
    if "categories" in state:
        known = known_categories(state)
        return read_annotations(
            path, image_folder, categories=known, categories_of=str(source), upright=upright, for_scoring=True
        )
    if not count_labels(state["model"]):
        raise UserError(f"{source}: holds no SSD300 network (it has no classification heads, conf.0 and so on)")
    annotations = read_annotations(path, image_folder, upright=upright, for_scoring=True)
    difference = _describe_difference(state, annotations.categories)
    if difference is not None:
        raise UserError(f"{source}: its categories are not those of {path}: {difference}")
    return annotations
