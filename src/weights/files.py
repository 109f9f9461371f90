"""Reads files with a network's weights without running code in them, and checks whether the weights fit."""

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
from src.ssd.model import BACKBONES

ONNX, TORCH_PROGRAM = ".onnx", ".pt2"  # suffixes of exported files: this version's, earlier versions'
FOREIGN_FILES = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"<!doctype": "an HTML page: the address leads to a page and not to the file; download the file itself",
    b"<html": "an HTML page: the address leads to a page and not to the file; download the file itself",
    b"<?xml": "an XML text, perhaps a server's error: download the file again",
    b"\x1f\x8b": "a gzip file: unpack it (gunzip, or tar -xzf)",
    b"\x89hdf": "an HDF5 file, as Keras writes it",
}  # first bytes of a file: what it is
KINDS = {
    "pytorch-lightning_version": "a checkpoint of PyTorch Lightning",
    "model_ema": "averaged weights (EMA)",
    "state_dict_ema": "averaged weights (EMA)",
    "ema": "averaged weights (EMA)",
    "ema_state_dict": "averaged weights (EMA)",
    "meta": "a checkpoint of MMDetection",
}  # key of a dict: what the dict is
LIBRARIES = {
    "pytorch_lightning": "a checkpoint of PyTorch Lightning: save its state_dict alone",
    "lightning": "a checkpoint of PyTorch Lightning: save its state_dict alone",
    "lightning_fabric": "a checkpoint of PyTorch Lightning: save its state_dict alone",
    "mmengine": "a checkpoint of MMDetection: save its state_dict alone",
    "mmcv": "a checkpoint of MMDetection: save its state_dict alone",
    "mmdet": "a checkpoint of MMDetection: save its state_dict alone",
    "ultralytics": "a model of Ultralytics YOLO, which is another network",
}  # package that a file needs: what the file is
REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)")  # in torch's messages


def load_checkpoint(path: Path) -> dict:
    """The content of a checkpoint, on the CPU: a dict with at least `model`; a bare state_dict becomes `model`.

    Reads files of torch.save and safetensors.  Parameter names lose DistributedDataParallel's prefix `module.`.
    Raises UserError if the file is no checkpoint.
    """
    state = _load_safely(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, not a checkpoint (a dict with `model`)")
    if not _is_network(state.get("model")):
        if not _is_network(state):
            raise UserError(f"{path}: has no network in it{_where_network_is(state)}")
        state = {"model": state}
    state["model"] = weights = dict(state["model"])
    consume_prefix_in_state_dict_if_present(weights, "module.")
    _check_fields(path, state)
    return state


def _is_network(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_parameter, value.items()))


def _is_parameter(entry: tuple) -> bool:
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor)


def _where_network_is(state: dict) -> str:
    """For a message: what a dict without `model` seems to be, and which key holds the weights."""
    keys = [key for key, value in state.items() if _is_network(value)]
    if not keys:
        return " (a dict of tensors by name, under `model` or by itself)"
    key = keys[0]
    kind = next((kind for mark, kind in KINDS.items() if mark in state or mark == key), "of another program")
    prefixes = {name.partition(".")[0] for name in state[key]}
    prefix = f", without the prefix {min(prefixes)!r} of its names" if len(prefixes) == 1 else ""
    return (
        f" under `model`: it seems to be {kind}. Take {key!r}{prefix}: torch.save({{'model': "
        f"torch.load(FILE, weights_only=False)[{key!r}]}}, NEW_FILE), if you trust the file"
    )


def _check_fields(path: Path, state: dict) -> None:
    """Raises UserError, which names the first field about the network that this program would not write so."""
    for name, tensor in state["model"].items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise UserError(f"{path}: model[{name!r}] is {tensor.dtype}, {tensor.layout}: expected plain numbers")
    if "backbone" in state and state["backbone"] not in BACKBONES:
        raise UserError(f"{path}: backbone = {short(state['backbone'])}: expected one of {', '.join(BACKBONES)}")
    if "categories" not in state:
        return
    categories = state["categories"]
    if not isinstance(categories, list | tuple) or not categories:
        raise UserError(f"{path}: categories = {short(categories)}: expected a list of [id, name]")
    for position, category in enumerate(categories):
        if not _is_category(category):
            raise UserError(
                f"{path}: categories[{position}] = {short(category)}: expected [id, name], a whole number and a text"
            )
    if len({category[0] for category in categories}) < len(categories):
        raise UserError(f"{path}: categories: an id stands twice")


def _is_category(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return type(value[0]) is int and -(2**63) <= value[0] < 2**63 and isinstance(value[1], str)


def short(value: object) -> str:
    """The value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _load_safely(path: Path) -> Any:
    """The content of a file of torch.save or safetensors; runs no code in it."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for mark, kind in FOREIGN_FILES.items():
        if start.lstrip()[: len(mark)].lower() == mark:
            raise UserError(f"{path}: is no checkpoint but {kind}")
    try:
        if start[8:9] == b"{":  # safetensors: the length of a JSON object in eight bytes, and that object
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch does not check the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"{damaged} is not as it was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocol: other files are parsed as pickle too
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the readers raise many kinds
        if path.suffix in (ONNX, TORCH_PROGRAM):
            raise UserError(f"{path}: is no checkpoint: give that from which it was exported") from None
        raise UserError(f"{path}: {_refusal(error)}") from None


def _refusal(error: Exception) -> str:
    """Why a file was not loaded, in one line; torch's messages are long."""
    needed = REFUSED_GLOBAL.search(str(error))
    if needed:
        package = needed[1].partition(".")[0]
        kind = f" (it seems to be {LIBRARIES[package]})" if package in LIBRARIES else ""
        return f"refused: it needs {needed[1]}, and only tensors, numbers, strings, lists and dicts are loaded{kind}"
    detail = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0].rstrip(": ")
    return f"is no checkpoint, or not a whole one ({detail})"


def check_fit(expected: dict[str, Tensor], weights: dict[str, Tensor], *, source: Path) -> None:
    """Raises UserError, which names the first parameter that is missing, unknown or has another shape."""
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{source}: does not fit this network: it has no {name} {list(tensor.shape)}")
        if tensor.is_floating_point() and not weights[name].is_floating_point():
            raise UserError(f"{source}: model[{name!r}] holds {weights[name].dtype}: expected floating-point numbers")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source}: does not fit this network: {name} is {list(weights[name].shape)} there and "
                f"{list(tensor.shape)} here (another --backbone, or other categories?)"
            )
    for name, tensor in weights.items():
        if name not in expected:
            raise UserError(f"{source}: does not fit this network, which has no {name} {list(tensor.shape)}")
