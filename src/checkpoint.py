"""Checkpoints: one writer, one reader, and the weights of published models.

A file holds tensors, plain numbers, strings, bytes, lists and dicts only, so that torch's safe loader reads it.
"""

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .errors import UserError
from .model import LAYERS_KEPT

LABEL_HEADS = "conf."  # names of the label heads' parameters start so
BACKBONE = "feature_extractor.feature_extractor."
# Names of torchvision's ResNet in the order of its children, which the published checkpoints number instead.
RESNET_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")[:LAYERS_KEPT]


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` so that a kill at any moment leaves either the old file or the new one, whole.

    Raises UserError where the file cannot be written (a full disk); the old one stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces the file by `content` in one step; raises UserError where that fails and leaves the old one."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); an earlier file there is as it was") from error


def load_checkpoint(path: Path) -> dict:
    """What is in a checkpoint: a dict with `model` at least; a bare state_dict becomes that.  On the CPU.

    Parameter names lose the `module.` of several processes.  Raises UserError for what is no checkpoint.
    """
    state = _load_safely(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint (a dict with `model`)")
    if "model" not in state:
        state = {"model": state}
    weights = state["model"]
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: has no network in it (a dict of tensors, under `model` or by itself)")
    state["model"] = weights = dict(weights)
    consume_prefix_in_state_dict_if_present(weights, "module.")
    return state


def _load_safely(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError as error:
        needed = re.search(r"(?:GLOBAL|Unsupported global:?|type) ([\w.]*\w)", str(error))
        reason = f"it needs {needed[1]}" if needed else "it is no file of torch.save"
        raise UserError(
            f"{path}: refused: {reason}, and only tensors, numbers, strings, lists and dicts are loaded"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is no whole checkpoint ({str(error).splitlines()[0]})") from None


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


def check_fit(expected: dict[str, Tensor], weights: dict[str, Tensor], *, source: Path) -> None:
    """Raises UserError that names the first parameter that is missing, of another shape, or unknown."""
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{source}: does not fit this network: it has no {name} {list(tensor.shape)}")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source}: does not fit this network: {name} is {list(weights[name].shape)} there and "
                f"{list(tensor.shape)} here (another --backbone, or other categories?)"
            )
    for name, tensor in weights.items():
        if name not in expected:
            raise UserError(f"{source}: does not fit this network, which has no {name} {list(tensor.shape)}")


def label_count(weights: dict[str, Tensor]) -> int:
    """Labels, the background included, that a network's label heads tell apart; 0 where it has none."""
    bias = weights.get(f"{LABEL_HEADS}0.bias")
    return 0 if bias is None else len(bias) // 4


def load_backbone_file(model: nn.Module, path: Path) -> None:
    """Loads a torchvision ResNet's state_dict (torch.save or safetensors) into the backbone.

    Layers beyond layer3 are left out.  Raises UserError where it is not of this backbone.
    """
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
    else:
        weights = load_checkpoint(path)["model"]
    load_backbone(model, weights, source=path)


def load_backbone(model: nn.Module, resnet: dict[str, Tensor], *, source: Path) -> None:
    """Loads the state_dict of torchvision's ResNet into the backbone; raises UserError where it does not fit."""
    weights = {}
    for name, tensor in resnet.items():
        child, _, rest = name.partition(".")
        if child in RESNET_CHILDREN:
            weights[f"{RESNET_CHILDREN.index(child)}.{rest}"] = tensor
    backbone = model.feature_extractor.feature_extractor
    expected = backbone.state_dict()
    for name in expected:
        # Files from before PyTorch 0.4.1 lack these counters, which nothing reads.
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, expected[name])
    check_fit(expected, weights, source=source)
    backbone.load_state_dict(weights)
