"""A detector's weights and labels, out of a checkpoint of ours or a published one."""

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

LABEL_HEADS = "conf."  # names of the label heads' parameters start so


def trained_model(state: dict, *, backbone: str, num_categories: int, source: Path, device: torch.device) -> SSD300:
    """The network of a checkpoint, which says itself what backbone it has unless it is a published one.

    backbone: that of a checkpoint which does not say.  Raises UserError where the weights do not fit.
    """
    model = SSD300(state.get("backbone", backbone), num_categories + 1)
    load_weights(model, state["model"], source=source, fresh_label_heads=False)
    return model.to(device).to(memory_format=torch.channels_last)


def load_weights(model: nn.Module, weights: dict[str, Tensor], *, source: Path, fresh_label_heads: bool) -> None:
    """Loads `weights` into the network; with `fresh_label_heads` the label heads stay as they were initialised.

    Raises UserError that names the first parameter that does not fit, and both shapes.
    """
    expected = model.state_dict()
    if fresh_label_heads:
        heads = {name: tensor for name, tensor in expected.items() if name.startswith(LABEL_HEADS)}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(LABEL_HEADS)} | heads
    check_fit(expected, weights, source=source)
    model.load_state_dict(weights)


def check_finite(weights: dict[str, Tensor], *, source: Path) -> None:
    """Raises UserError that names the first parameter or statistic which is not finite."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity: take a checkpoint from before the run broke down")


def load_detector(model: nn.Module, state: dict, categories: Sequence[Category], *, source: Path) -> list[str]:
    """Loads a checkpoint's weights to start training from; lines to print, where the label heads start afresh.

    They do where the checkpoint's categories are not these.  Raises UserError where the weights do not fit or are not
    finite.
    """
    difference = _difference(state, categories)
    load_weights(model, state["model"], source=source, fresh_label_heads=difference is not None)
    check_finite(state["model"], source=source)
    if difference is None:
        return []
    return [
        f"{source}: its categories are not the data's ({difference}): backbone, extra blocks and localisation heads "
        "are loaded, the label heads start afresh"
    ]


def _difference(state: dict, categories: Sequence[Category]) -> str | None:
    """How a checkpoint's labels differ from these categories, None where they do not.

    By name and order; a checkpoint that does not say what its labels are is judged by their number.
    """
    names = label_names(state)
    there, here = label_count(state["model"]) - 1, len(categories)
    if names is None:
        return f"{there} there, {here} here" if there != here else None
    return first_difference([*map(repr, names)], [repr(category.name) for category in categories])


def first_difference(there: Sequence[str], here: Sequence[str]) -> str | None:
    """The first label at which two lists of categories part, in words; None where they are the same."""
    for label, (one, other) in enumerate(zip_longest(there, here, fillvalue="nothing"), 1):
        if one != other:
            return f"label {label} is {one} there and {other} here"
    return None


def label_count(weights: dict[str, Tensor]) -> int:
    """Labels, the background included, that a network's label heads tell apart; 0 where it has none."""
    bias = weights.get(f"{LABEL_HEADS}0.bias")
    return 0 if bias is None else bias.numel() // BOXES_PER_CELL[0]


def label_names(state: dict) -> list[str] | None:
    """The names of a checkpoint's labels from 1 on, None where it does not say.

    A published checkpoint may have them as `label_map`: label -> name.
    """
    if "categories" in state:
        return [name for _, name in state["categories"]]
    label_map = state.get("label_map")
    labels = range(1, label_count(state["model"]))
    if isinstance(label_map, dict) and all(isinstance(label_map.get(label), str) for label in labels):
        return [label_map[label] for label in labels]
    return None


def known_categories(state: dict) -> tuple[Category, ...]:
    """The categories that a checkpoint's labels stand for.

    The ids of a published one, which does not say, are its labels; the names "label 1" and so on where it has none.
    """
    if "categories" in state:
        return tuple(Category(*category) for category in state["categories"])
    names = label_names(state) or [f"label {label}" for label in range(1, label_count(state["model"]))]
    return tuple(Category(label, name) for label, name in enumerate(names, 1))


def read_labelled(path: Path, image_folder: Path, state: dict, *, source: Path, upright: bool = False) -> Annotations:
    """A validation file's annotations, labelled as the checkpoint's network was trained.

    A published checkpoint is taken to follow the order of the file's own categories.  upright: see `read_annotations`.
    Raises DataError or UserError where the categories are not the checkpoint's.
    """
    if "categories" in state:
        known = known_categories(state)
        return read_annotations(
            path, image_folder, categories=known, categories_of=str(source), upright=upright, for_scoring=True
        )
    if not label_count(state["model"]):
        raise UserError(f"{source}: holds no SSD300 network (it has no label heads, conf.0 and so on)")
    annotations = read_annotations(path, image_folder, upright=upright, for_scoring=True)
    difference = _difference(state, annotations.categories)
    if difference is not None:
        raise UserError(f"{source}: its categories are not those of {path}: {difference}")
    return annotations
