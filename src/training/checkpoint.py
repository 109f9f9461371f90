"""Checkpoints of runs, which `src.weights` reads.

A file holds tensors, plain numbers, strings, bytes, lists and dicts only, so that torch's safe loader reads it.
"""

import io
from pathlib import Path

import torch

from src.output import replacing


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` so that a kill at any moment leaves either the old file or the new one, whole.

    Raises UserError where the file cannot be written (a full disk); the old one stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())
