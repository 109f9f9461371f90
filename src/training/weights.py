"""The weights a run starts from: ImageNet's, a file's, or those of a detector trained before."""

import socket
from collections.abc import Sequence
from http.client import HTTPException
from itertools import zip_longest
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn
from torchvision import models

from src.data.coco import Annotations, Category, read_annotations
from src.errors import UserError

from .checkpoint import label_count, load_backbone, load_backbone_file, load_weights

IMAGENET, RANDOM = "imagenet", "none"
DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def load_backbone_weights(model: nn.Module, backbone: str, choice: str) -> None:
    """Fills the backbone as --backbone-weights has it: "imagenet", "none" (left random) or a file's path.

    "imagenet" is torchvision's best: IMAGENET1K_V2 for resnet50, 101 and 152, IMAGENET1K_V1 for resnet18 and 34, which
    have no second.  Raises UserError where the weights cannot be had or do not fit.
    """
    if choice == IMAGENET:
        weights = models.get_model_weights(backbone).DEFAULT
        file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
        if file.exists():
            load_backbone_file(model, file)
        else:
            load_backbone(model, _fetch(weights, file), source=file)
    elif choice != RANDOM:
        load_backbone_file(model, Path(choice).expanduser())


def _fetch(weights: models.WeightsEnum, file: Path) -> dict:
    """The state_dict from its address, which torchvision keeps in its cache, as `file`."""
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"--backbone-weights imagenet: cannot fetch {weights.url} into {file.parent} "
            f"({getattr(error, 'reason', error)}): put the file there, name it (--backbone-weights FILE), or start "
            "from random weights (--backbone-weights none)"
        ) from error
    finally:
        socket.setdefaulttimeout(waiting)


def load_detector(model: nn.Module, state: dict, categories: Sequence[Category], *, source: Path) -> list[str]:
    """Loads a checkpoint's weights to start training from; lines to print, where the label heads start afresh.

    They do where the checkpoint's categories are not these.  Raises UserError where the weights do not fit or are not
    finite.
    """
    difference = _difference(state, categories)
    load_weights(model, state["model"], source=source, fresh_label_heads=difference is not None)
    for name, weights in state["model"].items():
        if not weights.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinity: take a checkpoint from before the run broke down")
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


def read_labelled(path: Path, image_folder: Path, state: dict, *, source: Path) -> Annotations:
    """A validation file's annotations, labelled as the checkpoint's network was trained.

    A published checkpoint is taken to follow the order of the file's own categories.  Raises DataError or UserError
    where the categories are not the checkpoint's.
    """
    if "categories" in state:
        return read_annotations(path, image_folder, categories=known_categories(state), categories_of=str(source))
    if not label_count(state["model"]):
        raise UserError(f"{source}: holds no SSD300 network (it has no label heads, conf.0 and so on)")
    annotations = read_annotations(path, image_folder)
    difference = _difference(state, annotations.categories)
    if difference is not None:
        raise UserError(f"{source}: its categories are not those of {path}: {difference}")
    return annotations
