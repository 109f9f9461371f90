"""Checkpoints: one writer, one reader, and the weights of published models.

A file holds tensors, plain numbers, strings, bytes, lists and dicts only, so that torch's safe loader reads it.
"""

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from src.errors import UserError
from src.output import replacing
from src.ssd.default_boxes import BOXES_PER_CELL
from src.ssd.model import LAYERS_KEPT

REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)")  # in torch's messages
LABEL_HEADS = "conf."  # names of the label heads' parameters start so
# Names of torchvision's ResNet in the order of its children, which the published checkpoints number instead.
RESNET_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")[:LAYERS_KEPT]


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` so that a kill at any moment leaves either the old file or the new one, whole.

    Raises UserError where the file cannot be written (a full disk); the old one stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """What is in a checkpoint: a dict with `model` at least; a bare state_dict becomes that.  On the CPU.

    A file of torch.save or safetensors.  Parameter names lose the `module.` of several processes.  Raises UserError
    for what is no checkpoint.
    """
    state = _load_safely(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, not a checkpoint (a dict with `model`)")
    if "model" not in state:
        state = {"model": state}
    weights = state["model"]
    if not isinstance(weights, dict) or not weights or not all(map(_is_parameter, weights.items())):
        raise UserError(f"{path}: has no network in it (a dict of tensors by name, under `model` or by itself)")
    state["model"] = weights = dict(weights)
    consume_prefix_in_state_dict_if_present(weights, "module.")
    return state


def _is_parameter(entry: tuple) -> bool:
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor)


def _load_safely(path: Path) -> Any:
    """What a file of torch.save or safetensors holds, none of whose code is run."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        if start[8:] == b"{":  # safetensors: the length of a JSON object in eight bytes, and that object
            return load_file(path)
        if zipfile.is_zipfile(path):  # its sums, which torch does not look at
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"{damaged} is not as it was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol, while any other file's bytes are taken for pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever strange bytes make the readers raise
        raise UserError(f"{path}: {_refusal(error)}") from None


def _refusal(error: Exception) -> str:
    """Why a file was not loaded, in a line; torch's own reasons are long."""
    needed = REFUSED_GLOBAL.search(str(error))
    if needed:
        return f"refused: it needs {needed[1]}, and only tensors, numbers, strings, lists and dicts are loaded"
    detail = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0].rstrip(": ")
    return f"is no checkpoint, or not a whole one ({detail})"


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
    return 0 if bias is None else bias.numel() // BOXES_PER_CELL[0]


def load_backbone_file(model: nn.Module, path: Path) -> None:
    """Loads a torchvision ResNet's state_dict (torch.save or safetensors) into the backbone.

    Raises UserError where it is not of this backbone.
    """
    load_backbone(model, load_checkpoint(path)["model"], source=path)


def load_backbone(model: nn.Module, resnet: dict[str, Tensor], *, source: Path) -> None:
    """Loads the state_dict of torchvision's ResNet into the backbone; layers beyond layer3 are left out.

    Raises UserError where it does not fit.
    """
    backbone = model.feature_extractor.feature_extractor
    expected = {_resnet_name(name): tensor for name, tensor in backbone.state_dict().items()}
    weights = {name: tensor for name, tensor in resnet.items() if name.partition(".")[0] in RESNET_CHILDREN}
    for name in expected:
        # Files from before PyTorch 0.4.1 lack these counters, which nothing reads.
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, expected[name])
    check_fit(expected, weights, source=source)
    backbone.load_state_dict({name: weights[_resnet_name(name)] for name in backbone.state_dict()})


def _resnet_name(name: str) -> str:
    """torchvision's name of a parameter of the backbone, which numbers the ResNet's children."""
    child, _, rest = name.partition(".")
    return f"{RESNET_CHILDREN[int(child)]}.{rest}"
