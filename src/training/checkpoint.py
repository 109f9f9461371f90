"""Checkpoints of runs: what is in them, one writer, one reader.

A file holds tensors, plain numbers, strings, bytes, lists and dicts only, so that torch's safe loader reads it.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from src.runtime.errors import UserError
from src.runtime.output_files import atomic_write
from src.weights.detector import first_difference
from src.weights.files import load_checkpoint, short

TRAINING_DATA = "the training data"  # one of the settings


@dataclass
class Position:
    """Where a run stands: what a checkpoint needs beside weights and pipeline to continue exactly."""

    epoch: int = 0  # the one it is in
    within: int = 0  # iterations done in that epoch
    length: int = 0  # iterations of an epoch
    iteration: int = 0  # iterations done since the run's start
    best_map: float | None = None
    last_map: float | None = None
    evaluated: bool = False  # whether there has been an evaluation at all


@dataclass(frozen=True)
class Identity:
    """What a run is about; a checkpoint carries it, so that continuing under other flags is noticed."""

    backbone: str
    categories: list[list[Any]]  # [id, name] in the order of the labels 1..K
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)  # flags that alter the run, and the data's digest, by name


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment.  In the file, the fields of position and identity stand beside the others."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # empty without loss scaling
    pipeline: list[dict[str, Any]]  # of each rank
    position: Position
    identity: Identity


PARTS = ("model", "optimizer", "scaler", "pipeline")  # of a checkpoint, as they are


def save_run(path: Path, checkpoint: Checkpoint, findings: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Writes a run's checkpoint; see `save_checkpoint`.  findings: of the network's evaluation; they stand beside."""
    state = {name: getattr(checkpoint, name) for name in PARTS}
    save_checkpoint(path, {**state, **asdict(checkpoint.position), **asdict(checkpoint.identity), **findings})


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that a kill at any moment leaves either the old file or the new one, whole.

    Raises UserError where the file cannot be written (a full disk); the old one stays.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except RuntimeError as error:  # torch's archive writer raises it while it handles a MemoryError of the buffer
        if isinstance(error.__context__, MemoryError):
            raise MemoryError(f"while {path.name} was made") from None
        raise
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_run(path: Path, identity: Identity) -> Checkpoint:
    """The checkpoint of a run that can be continued as `identity`.

    Raises UserError where it holds no run, or one of another backbone or other categories.
    """
    state = load_checkpoint(path)
    position, theirs = ([part.name for part in fields(kind)] for kind in (Position, Identity))
    missing = [name for name in (*position, *theirs, *PARTS) if name not in state]
    if missing:
        raise UserError(f"{path}: holds weights but no run to continue (no {missing[0]}): use --checkpoint {path}")
    checkpoint = Checkpoint(
        **{name: state[name] for name in PARTS},
        position=Position(**{name: state[name] for name in position}),
        identity=Identity(**{name: state[name] for name in theirs}),
    )
    _check_fields(path, state)
    _check_same_run(path, checkpoint.identity, identity)
    return checkpoint


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _is_settings(value: object) -> bool:
    wanted = ("--batch-size", "the number of processes")
    return isinstance(value, dict) and all(_is_count(value.get(name)) and value[name] for name in wanted)


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
}  # of a checkpoint, which `load_checkpoint` has not looked at: what is accepted, and how to say it  # fmt: skip


def _check_fields(path: Path, state: dict[str, Any]) -> None:
    """Raises UserError that names the first field of a run which holds what this program never writes there."""
    for name, (accepts, expected) in FIELDS.items():
        if not accepts(state[name]):
            raise UserError(f"{path}: {name} = {short(state[name])}: expected {expected}; use --checkpoint {path}")
    if state["within"] > state["length"]:
        raise UserError(f"{path}: within = {state['within']}: expected at most length = {state['length']}")


def _check_same_run(path: Path, theirs: Identity, ours: Identity) -> None:
    if theirs.backbone != ours.backbone:
        raise UserError(f"{path}: is a run of --backbone {theirs.backbone}, not {ours.backbone}")
    if theirs.categories != ours.categories:
        there, here = ([f"{name!r} (id {id})" for id, name in side] for side in (theirs.categories, ours.categories))
        raise UserError(
            f"{path}: is a run on other categories than the data's ({first_difference(there, here)}): to train these "
            f"from its weights use --checkpoint {path}"
        )
