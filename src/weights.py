"""The weights a run starts from: ImageNet's, a file's, or those of a detector trained before."""

import socket
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn
from torchvision import models

from .checkpoint import label_count, load_backbone, load_backbone_file, load_weights
from .coco import Annotations, Category, read_annotations
from .errors import UserError

IMAGENET, RANDOM = "imagenet", "none"
DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def load_backbone_weights(model: nn.Module, backbone: str, choice: str) -> None:
    """Fills the backbone as --backbone-weights has it: "imagenet", "none" (left random) or a file's path.

    Raises UserError where the weights cannot be had or do not fit.
    """
    if choice == IMAGENET:
        load_backbone(model, fetch_imagenet(backbone), source=Path(f"torchvision's {backbone}"))
    elif choice != RANDOM:
        load_backbone_file(model, Path(choice).expanduser())


def fetch_imagenet(backbone: str) -> dict:
    """torchvision's best ImageNet state_dict of the backbone, from its cache or its address.

    IMAGENET1K_V2 for resnet50, 101 and 152, IMAGENET1K_V1 for resnet18 and 34, which have no second.
    """
    weights = models.get_model_weights(backbone).DEFAULT
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--backbone-weights imagenet: cannot fetch {weights.url} into {Path(torch.hub.get_dir(), 'checkpoints')} "
            f"({getattr(error, 'reason', error)}): put the file there, name it (--backbone-weights FILE), or start "
            "from random weights (--backbone-weights none)"
        ) from error
    finally:
        socket.setdefaulttimeout(waiting)


def load_detector(model: nn.Module, state: dict, categories: tuple[Category, ...], *, source: Path) -> list[str]:
    """Loads a checkpoint's weights to start training from; lines to print, where the label heads start afresh.

    They do where the checkpoint's categories are not these.  Raises UserError where the weights do not fit.
    """
    fresh = not same_labels(state, categories)
    load_weights(model, state["model"], source=source, fresh_label_heads=fresh)
    if not fresh:
        return []
    return [
        f"{source}: its {label_count(state['model']) - 1} categories are not these {len(categories)}: backbone, "
        "extra blocks and localisation heads are loaded, the label heads start afresh"
    ]


def same_labels(state: dict, categories: tuple[Category, ...]) -> bool:
    """Whether a checkpoint's labels are these categories; one that does not say is judged by their number."""
    if "categories" in state:
        return [tuple(category) for category in state["categories"]] == list(categories)
    return label_count(state["model"]) == len(categories) + 1


def known_categories(state: dict) -> tuple[Category, ...]:
    """The categories that a checkpoint's labels stand for.

    A published checkpoint may name them (`label_map`); one that does not gets "label 1" and so on, as ids too.
    """
    if "categories" in state:
        return tuple(Category(*category) for category in state["categories"])
    names = state.get("label_map") or {}
    return tuple(Category(k, names.get(k, f"label {k}")) for k in range(1, label_count(state["model"])))


def read_labelled(path: Path, image_folder: Path, state: dict, *, source: Path) -> Annotations:
    """A validation file's annotations, labelled as the checkpoint's network was trained.

    A published checkpoint that does not say is taken to follow the order of the file's own categories.
    Raises DataError or UserError where the categories are not the checkpoint's.
    """
    if "categories" in state:
        return read_annotations(path, image_folder, categories=known_categories(state))
    annotations = read_annotations(path, image_folder)
    if not same_labels(state, annotations.categories):
        raise UserError(
            f"{source}: tells {label_count(state['model']) - 1} categories apart, but {path} has "
            f"{len(annotations.categories)}"
        )
    names = state.get("label_map") or {}
    for label, category in enumerate(annotations.categories, 1):
        if names.get(label, category.name) != category.name:
            raise UserError(f"{source}: label {label} is {names[label]!r}, but {category.name!r} in {path}")
    return annotations
