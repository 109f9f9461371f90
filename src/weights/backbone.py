"""The initial weights of a backbone: ImageNet's or a file's."""

import socket
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision import models

from src.runtime.errors import UserError
from src.ssd.model import LAYERS_KEPT
from src.weights.files import check_fit, load_checkpoint

IMAGENET, RANDOM = "imagenet", "none"
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
# Names of torchvision's ResNet in the order of its children, which the published checkpoints number instead.
RESNET_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")[:LAYERS_KEPT]


def load_backbone_weights(model: nn.Module, backbone: str, choice: str) -> None:
    """Loads what --backbone-weights names: "imagenet", "none" (keeps random weights) or a file's path.

    "imagenet" is torchvision's best: IMAGENET1K_V2 for resnet50, 101 and 152, IMAGENET1K_V1 for resnet18 and 34, which
    have no V2.  Raises UserError if the weights cannot be fetched or do not fit.
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
    """Downloads the state_dict; torchvision stores it in its cache as `file`."""
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


def load_backbone_file(model: nn.Module, path: Path) -> None:
    """Loads a torchvision ResNet's state_dict (torch.save or safetensors) into the backbone.

    Raises UserError if it is not of this backbone.
    """
    load_backbone(model, load_checkpoint(path)["model"], source=path)


def load_backbone(model: nn.Module, resnet: dict[str, Tensor], *, source: Path) -> None:
    """Loads the state_dict of torchvision's ResNet up to layer3 into the backbone.

    Raises UserError if it does not fit.
    """
    backbone = model.get_submodule("feature_extractor.feature_extractor")
    expected = {_resnet_name(name): tensor for name, tensor in backbone.state_dict().items()}
    weights = {name: tensor for name, tensor in resnet.items() if name.partition(".")[0] in RESNET_CHILDREN}
    for name in expected:
        # Files from before PyTorch 0.4.1 lack these counters.  Nothing reads them.
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, expected[name])
    check_fit(expected, weights, source=source)
    backbone.load_state_dict({name: weights[_resnet_name(name)] for name in backbone.state_dict()})


def _resnet_name(name: str) -> str:
    """torchvision's name of a backbone parameter; the backbone numbers the ResNet's children instead."""
    child, _, rest = name.partition(".")
    return f"{RESNET_CHILDREN[int(child)]}.{rest}"
