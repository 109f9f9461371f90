"""Finds pictures that DALI cannot decode, although the other pipeline can."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.dali_graph import DECODER_INPUT, device_index, make_decoder, short_reason
from src.runtime.errors import DataError

STDERR = 2  # the file descriptor, to which libraries in C write
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class DaliDecodeCheck:
    """Finds pictures that DALI cannot decode, with its decoder configured as in the training graph."""

    def __init__(self, annotations: Annotations, *, device: torch.device, num_threads: int) -> None:
        """num_threads: of the decoder, and the number of pictures decoded at a time."""
        self.annotations = annotations
        self.messages: list[str] = []
        self.num_threads = max(1, num_threads)
        self._device_id = device_index(device)
        self._start()

    def find_errors(self, indices: Sequence[int]) -> list[DataError]:
        """An error for each of these images that DALI cannot decode, or not to the annotation file's size.

        Their files must exist and not be empty.
        """
        if len(indices) > self.num_threads:
            starts = range(0, len(indices), self.num_threads)
            chunks = [indices[start : start + self.num_threads] for start in starts]
            return [error for chunk in chunks for error in self.find_errors(chunk)]
        printed: list[str] = []
        try:
            with capture_stderr(printed):
                has_size = self._decode_to_annotated_size(indices)
        except RuntimeError as error:
            self._start()  # a pipeline ends with its first error, which does not name the picture
            if len(indices) > 1:
                return [error for index in indices for error in self.find_errors([index])]
            return [decode_error(self.annotations, indices[0], f"cannot decode it ({short_reason(error)})")]
        if printed and len(indices) > 1:  # find out by which of them
            return [error for index in indices for error in self.find_errors([index])]
        self.messages += [f"{self.annotations.image_path(indices[0]).absolute()}: DALI: {line}" for line in printed]
        return [size_error(self.annotations, index) for index, ok in zip(indices, has_size, strict=True) if not ok]

    def _decode_to_annotated_size(self, indices: Sequence[int]) -> list[bool]:
        """Whether each picture has the annotation file's size.  Raises RuntimeError if one cannot be decoded."""
        files = [np.fromfile(self.annotations.image_path(index), np.uint8) for index in indices]
        self._pipeline.feed_input(DECODER_INPUT, files)
        by_header, decoded = self._pipeline.run()
        annotated = self.annotations.sizes[list(indices), ::-1].tolist()  # height, width
        sizes = zip(by_header.as_array().tolist(), decoded.shape(), annotated, strict=True)
        return [list(header[:2]) == list(picture[:2]) == size for header, picture, size in sizes]

    def _start(self) -> None:
        self._pipeline = make_decoder(
            batch_size=self.num_threads, device_id=self._device_id, upright=self.annotations.upright
        )


@contextmanager
def capture_stderr(lines: list[str]) -> Iterator[None]:
    """Collects in `lines` what the process writes to standard error in the block, C libraries included."""
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


def size_error(annotations: Annotations, index: int) -> DataError:
    """The error of a picture for which only DALI reads another size than the annotation file's."""
    width, height = annotations.sizes[index]
    return decode_error(annotations, index, f"does not read it as {width} x {height}")


def decode_error(annotations: Annotations, index: int, why: str) -> DataError:
    """The error of a picture that only DALI does not accept."""
    path = annotations.image_path(index).absolute()
    return DataError(f"{path}: DALI {why}: store it anew, or use --data_pipeline no_dali")
