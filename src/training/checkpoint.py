"""Checkpoints of runs: what is in them, one writer, one reader.

A file holds tensors, plain numbers, strings, bytes, lists and dicts only, so that torch's safe loader reads it.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from src.runtime.errors import UserError
from src.runtime.output_files import atomic_write
from src.weights.detector import describe_first_difference
from src.weights.files import load_checkpoint, short

TRAINING_DATA_KEY = "the training data"  # one of the settings


@dataclass
class Position:
    """Where a run stands and how good its network has been."""

    epoch: int = 0  # the current one
    iteration_in_epoch: int = 0  # iterations done in the current epoch
    iterations_per_epoch: int = 0
    iteration: int = 0  # iterations done since the run's start
    best_map: float | None = None
    last_map: float | None = None
    evaluated: bool = False  # the run has had an evaluation


@dataclass(frozen=True)
class RunFingerprint:
    """What defines a run.  Checkpoints hold it, so that continuing with other flags or other data is noticed."""

    backbone: str
    categories: list[list[Any]]  # [id, name] in the order of the labels 1..K
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)  # the run-defining flags and the data's digest, by name


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment.  The file holds the fields of position and fingerprint at its top level."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # empty without loss scaling
    pipeline: list[dict[str, Any]]  # of each rank
    position: Position
    fingerprint: RunFingerprint


STATE_KEYS = ("model", "optimizer", "scaler", "pipeline")  # in a file and in Checkpoint
# Keys of a file that differ from the names of their fields: the keys are frozen, because older checkpoints must load.
KEY_OF_FIELD = {"iteration_in_epoch": "within", "iterations_per_epoch": "length"}


def _keys(part: type[Position] | type[RunFingerprint]) -> dict[str, str]:
    """The key in a file for each field of a part."""
    return {field.name: KEY_OF_FIELD.get(field.name, field.name) for field in fields(part)}


def save_run(path: Path, checkpoint: Checkpoint, evaluation_state: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Writes a run's checkpoint; see `save_checkpoint`.

    evaluation_state: what the network's evaluation adds to the file's top level.
    """
    state: dict[str, Any] = {name: getattr(checkpoint, name) for name in STATE_KEYS}
    for part in (checkpoint.position, checkpoint.fingerprint):
        state |= {key: getattr(part, name) for name, key in _keys(type(part)).items()}
    save_checkpoint(path, {**state, **evaluation_state})


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state`; a kill at any moment leaves the old file or the new one complete.

    Raises UserError, and keeps the old file, if the new one cannot be written (a full disk).
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except RuntimeError as error:  # torch's archive writer turns the buffer's MemoryError into one
        if isinstance(error.__context__, MemoryError):
            raise MemoryError(f"while {path.name} was made") from None
        raise
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_run(path: Path, fingerprint: RunFingerprint) -> Checkpoint:
    """The checkpoint of a run that `fingerprint` can continue.

    Raises UserError if the file holds no run, or a run with another backbone or other categories.
    """
    state = load_checkpoint(path)
    position_keys, fingerprint_keys = _keys(Position), _keys(RunFingerprint)
    expected = (*position_keys.values(), *fingerprint_keys.values(), *STATE_KEYS)
    missing = [key for key in expected if key not in state]
    if missing:
        raise UserError(f"{path}: holds weights but no run to continue (no {missing[0]}): use --checkpoint {path}")
    _check_fields(path, state)
    checkpoint = Checkpoint(
        **{key: state[key] for key in STATE_KEYS},
        position=Position(**{name: state[key] for name, key in position_keys.items()}),
        fingerprint=RunFingerprint(**{name: state[key] for name, key in fingerprint_keys.items()}),
    )
    _check_same_run(path, checkpoint.fingerprint, fingerprint)
    return checkpoint


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _is_settings(value: object) -> bool:
    required = ("--batch-size", "the number of processes")
    return isinstance(value, dict) and all(_is_count(value.get(name)) and value[name] for name in required)


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(one, dict) and "params" in one for one in groups)


COUNT, SCORE = "a whole number, 0 or more", "a number from 0 to 1, or None"
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "optimizer": (_is_optimizer, "the state_dict of an optimizer"),
    "scaler": (lambda value: isinstance(value, dict), "a dict"),
    "pipeline": (lambda value: isinstance(value, list) and bool(value) and all(isinstance(own, dict) for own in value),
                 "a list with a dict for each process"),
    "epoch": (_is_count, COUNT),
    "within": (_is_count, COUNT),
    "length": (_is_count, COUNT),
    "iteration": (_is_count, COUNT),
    "best_map": (_is_score, SCORE),
    "last_map": (_is_score, SCORE),
    "evaluated": (lambda value: isinstance(value, bool), "True or False"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**64, "a whole number from 0 to 2^64 - 1"),
    "settings": (_is_settings, "a dict with --batch-size and the number of processes"),
}  # by key, for keys that `load_checkpoint` does not check: a test of the value, and what it expects  # fmt: skip


def _check_fields(path: Path, state: dict[str, Any]) -> None:
    """Raises UserError that names the first key whose value this program cannot have written."""
    for name, (accepts, expected) in FIELDS.items():
        if not accepts(state[name]):
            raise UserError(f"{path}: {name} = {short(state[name])}: expected {expected}; use --checkpoint {path}")
    if state["within"] > state["length"]:
        raise UserError(f"{path}: within = {state['within']}: expected at most length = {state['length']}")


def _check_same_run(path: Path, theirs: RunFingerprint, ours: RunFingerprint) -> None:
    if theirs.backbone != ours.backbone:
        raise UserError(f"{path}: is a run of --backbone {theirs.backbone}, not {ours.backbone}")
    if theirs.categories != ours.categories:
        there, here = ([f"{name!r} (id {id})" for id, name in side] for side in (theirs.categories, ours.categories))
        difference = describe_first_difference(there, here)
        raise UserError(
            f"{path}: is a run on other categories than the data's ({difference}): to train these "
            f"from its weights use --checkpoint {path}"
        )
