"""Pictures that DALI refuses though the other pipeline reads them."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.dali_graph import FILES, cause, device_index, make_decoder
from src.runtime.errors import DataError

STDERR = 2  # the file descriptor, to which libraries in C write
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class DaliDecodeCheck:
    """Decodes whole pictures by DALI's decoder, set as in the training graph, to name those that it refuses."""

    def __init__(self, annotations: Annotations, *, device: torch.device, num_threads: int) -> None:
        """num_threads: also how many pictures are decoded at a time."""
        self.annotations = annotations
        self.messages: list[str] = []
        self.num_threads = max(1, num_threads)
        self._device_id = device_index(device)
        self._start()

    def faults(self, indices: Sequence[int]) -> list[DataError]:
        """An error for each of these images that DALI does not decode to the annotation file's size.

        Their files must be there and not be empty.
        """
        if len(indices) > self.num_threads:
            starts = range(0, len(indices), self.num_threads)
            return [fault for start in starts for fault in self.faults(indices[start : start + self.num_threads])]
        printed: list[str] = []
        try:
            with captured_stderr(printed):
                right = self._are_right(indices)
        except RuntimeError as error:
            self._start()  # a pipeline ends with its first error, which does not say whose it is
            if len(indices) > 1:
                return [fault for index in indices for fault in self.faults([index])]
            return [refused(self.annotations, indices[0], f"cannot decode it ({cause(error)})")]
        if printed and len(indices) > 1:  # of one of them
            return [fault for index in indices for fault in self.faults([index])]
        self.messages += [f"{self.annotations.image_path(indices[0]).absolute()}: DALI: {line}" for line in printed]
        return [wrong_size(self.annotations, index) for index, ok in zip(indices, right, strict=True) if not ok]

    def _are_right(self, indices: Sequence[int]) -> list[bool]:
        """Whether each picture has the annotation file's size.  Raises RuntimeError where one cannot be decoded."""
        files = [np.fromfile(self.annotations.image_path(index), np.uint8) for index in indices]
        self._pipeline.feed_input(FILES, files)
        told, decoded = self._pipeline.run()
        sizes = zip(told.as_array().tolist(), decoded.shape(), strict=True)
        wanted = self.annotations.sizes[list(indices), ::-1].tolist()
        return [list(one[:2]) == list(other[:2]) == size for (one, other), size in zip(sizes, wanted, strict=True)]

    def _start(self) -> None:
        self._pipeline = make_decoder(
            batch_size=self.num_threads, device_id=self._device_id, upright=self.annotations.upright
        )


@contextmanager
def captured_stderr(lines: list[str]) -> Iterator[None]:
    """Adds what the process writes to standard error in the block to `lines`: decoders print without a file's name."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(STDERR)
        os.dup2(file.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(saved, STDERR)
            os.close(saved)
            file.seek(0)
            text = COLOUR_CODES.sub("", file.read().decode(errors="replace"))
            lines += [line.strip() for line in text.splitlines() if line.strip()]


def wrong_size(annotations: Annotations, index: int) -> DataError:
    """The error of a picture whose size only DALI has otherwise than the annotation file."""
    width, height = annotations.sizes[index]
    return refused(annotations, index, f"does not read it as {width} x {height}")


def refused(annotations: Annotations, index: int, why: str) -> DataError:
    path = annotations.image_path(index).absolute()
    return DataError(f"{path}: DALI {why}: store it anew, or use --data_pipeline no_dali")
