"""Files with a network's weights: checkpoints of any kind, read without running code, and whether they fit."""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from src.runtime.errors import UserError

ONNX, TORCH_PROGRAM = ".onnx", ".pt2"  # suffixes of exported files, of this version and of earlier ones
REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)")  # in torch's messages


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
        if path.suffix in (ONNX, TORCH_PROGRAM):
            raise UserError(f"{path}: is no checkpoint: give that from which it was exported") from None
        raise UserError(f"{path}: {_refusal(error)}") from None


def _refusal(error: Exception) -> str:
    """Why a file was not loaded, in a line; torch's own reasons are long."""
    needed = REFUSED_GLOBAL.search(str(error))
    if needed:
        return f"refused: it needs {needed[1]}, and only tensors, numbers, strings, lists and dicts are loaded"
    detail = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0].rstrip(": ")
    return f"is no checkpoint, or not a whole one ({detail})"


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
