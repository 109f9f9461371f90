"""The DALI training pipeline (`--data_pipeline dali`): the loader around the graph of dali_graph.py.

The graph reads the cleaned annotations from temporary files.  DALI has its own random generators, so the state of this
pipeline is a DALI checkpoint, stored with the settings for which it is valid.
"""

import gc
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.annotations.coco import Annotations
from src.data.images.decode import JPEG_END, JPEG_START, is_utf8_path
from src.data.pipelines.augment import colour_matrix
from src.data.pipelines.batch import Batch, colour_and_normalise, normalise
from src.data.pipelines.dali_decode_check import DaliDecodeCheck, size_error
from src.data.pipelines.dali_files import try_write_reader_files, write_clean_file
from src.data.pipelines.dali_graph import (
    AUGMENTATION_OUTPUTS,
    GPU_OUTPUTS,
    OUTPUTS,
    PREFETCH,
    VERSIONS,
    Settings,
    dali,
    device_index,
    make_pipeline,
    short_reason,
)
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.runtime.devices import copy_to_device
from src.runtime.errors import UserError
from src.runtime.output_files import convert_write_errors

SEARCH_SECONDS = 60  # to find the image on which DALI failed; other processes wait for twice as long


class DaliTrainLoader:
    """The training loader of `--data_pipeline dali`; see `loaders.TrainLoader`.

    One DALI pipeline, built when first needed, runs for all epochs.  `warnings` has a line for each state that could
    not be restored.
    """

    def __init__(self, annotations: Annotations, config: LoaderConfig, *, augment: bool = True) -> None:
        self.annotations = annotations
        self.image_indices = annotations.with_boxes()  # index in the annotations, by the graph's image id
        self.num_images = len(self.image_indices)
        self.batch_size = config.batch_size
        self.device = config.device
        self.dtype = config.dtype
        self.seed = config.seed
        self.rank, self.world_size = config.shard
        self.num_threads = max(1, config.num_workers)
        self.augment = augment
        self.warnings: list[str] = []
        self._output_names: tuple[str, ...] = OUTPUTS
        if augment:
            self._output_names += AUGMENTATION_OUTPUTS
        if config.device.type == "cuda":
            self._output_names += GPU_OUTPUTS
        self._complete_files: set[int] = set()  # images that decode, although JPEG's end marker is missing
        self._pipeline: dali.Pipeline | None = None
        self._first_epoch = 0  # that the pipeline ran
        self._position = 0  # batches that the pipeline has returned

    def __len__(self) -> int:
        """Iterations per epoch, the same on every process."""
        share = -(-self.num_images // self.world_size)
        return -(-share // self.batch_size)

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """Moves the start of the next pass to `start_iteration` of `epoch`.

        If the pipeline is at another position, starts a new one, which depends on seed, epoch and rank only, and skips
        the iterations before.
        """
        if self._pipeline is not None and self._position == self._position_of(epoch, start_iteration):
            return
        self._start(epoch)
        for _ in range(start_iteration):
            self._run()

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the current position to the end of its epoch."""
        # A pipeline that starts here sets the position.
        self._started_pipeline()
        for _ in range(len(self) - self._position % len(self)):
            yield self._next_batch()

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch: DALI's checkpoint, and the settings for which it is valid."""
        return {
            "checkpoint": self._started_pipeline().checkpoint(),
            "first_epoch": self._first_epoch,
            "position": self._position,
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any], *, epoch: int, iteration: int) -> None:
        """Restores `state`, taken in `epoch` after `iteration` iterations.

        Inside an epoch, raises UserError if `state` was written with other settings or by `--data_pipeline no_dali`.
        Between epochs such a state causes a line in `warnings` instead, and the next pass starts a new pipeline.
        """
        differences = self._differences(state)
        if not differences:
            self._start(state["first_epoch"], state["checkpoint"])
            self._position = state["position"]
            assert self._position == self._position_of(epoch, iteration)
            return
        if iteration % len(self):
            raise UserError(
                f"cannot continue inside epoch {epoch}: the checkpoint was written with {differences}: use the "
                "settings of the checkpoint, or a checkpoint from the end of an epoch"
            )
        self.close()
        self._first_epoch, self._position = epoch + iteration // len(self), 0
        self.warnings.append(f"the checkpoint was written with {differences}: the DALI pipeline starts afresh")

    def fingerprint(self) -> dict[str, Any]:
        """The settings for which a state is valid, as plain values."""
        return {
            "seed": self.seed,
            "batch size": self.batch_size,
            "processes": self.world_size,
            "rank": self.rank,
            "augmentation": self.augment,
            "orientation": "upright" if self.annotations.upright else "stored",
            "device": self.device.type,
            "DALI": dali.__version__,
            "version of the graph": VERSIONS[self.device.type],
            "images": self.num_images,
            "annotations": self.annotations.digest,
        }

    def close(self) -> None:
        """Ends the pipeline's threads and frees its memory; a later pass starts a new pipeline."""
        self._pipeline = None
        gc.collect()  # DALI's pipeline objects are parts of reference cycles

    def build(self, output_names: tuple[str, ...], checkpoint: bytes | None = None) -> dali.Pipeline:
        """A pipeline with this loader's settings and these outputs; see `make_pipeline`."""
        if not is_utf8_path(self.annotations.image_folder):
            # Raises UserError with the path: DALI cannot open a path that is not UTF-8, and would not name it.
            read_image(self.annotations, int(self.image_indices[0]))
        with tempfile.TemporaryDirectory(prefix="ssd300-") as folder:
            annotations, names = self._write_annotations(Path(folder))
            try:
                return make_pipeline(
                    self._settings(),
                    annotations,
                    self.annotations.image_folder,
                    names,
                    output_names=output_names,
                    checkpoint=checkpoint,
                )
            except RuntimeError as error:
                too_large = re.search("batch size|memory|alloc", reason := short_reason(error), re.IGNORECASE)
                hint = "lower --batch-size" if too_large else "use --data_pipeline no_dali"
                raise UserError(f"DALI cannot start ({reason}): {hint}") from None

    def _settings(self) -> Settings:
        return Settings(
            batch_size=self.batch_size,
            device_id=device_index(self.device),
            num_threads=self.num_threads,
            augment=self.augment,
            seed=_derived_seed(self.seed, self._first_epoch, self.rank),
            order_seed=_derived_seed(self.seed, self._first_epoch),
            rank=self.rank,
            world_size=self.world_size,
            upright=self.annotations.upright,
        )

    def _write_annotations(self, folder: Path) -> tuple[Path, list[str] | None]:
        """Writes the annotations into `folder`; returns `make_pipeline`'s arguments `annotations` and `file_names`."""
        order = self._first_order()
        with convert_write_errors(folder):
            if try_write_reader_files(self.annotations, order, folder):
                return folder, None
            annotation_file = folder / "annotations.json"
            write_clean_file(self.annotations, annotation_file)
        return annotation_file, [self.annotations.file_name(index) for index in order.tolist()]

    def _first_order(self) -> np.ndarray:
        """The images in the order of the first epoch, repeated to at least one per process, as DALI requires."""
        order = np.random.default_rng([self.seed, self._first_epoch]).permutation(self.image_indices)
        return np.resize(order, max(len(order), self.world_size))

    def _position_of(self, epoch: int, iteration: int) -> int:
        return (epoch - self._first_epoch) * len(self) + iteration

    def _started_pipeline(self) -> dali.Pipeline:
        """The running pipeline; starts one if none runs."""
        return self._start(self._first_epoch) if self._pipeline is None else self._pipeline

    def _start(self, epoch: int, checkpoint: bytes | None = None) -> dali.Pipeline:
        self.close()
        self._first_epoch, self._position = epoch, 0
        self._pipeline = self.build(self._output_names, checkpoint)
        return self._pipeline

    def _differences(self, state: dict[str, Any]) -> str:
        """The settings in which a state differs from this loader, for a message; empty if none."""
        if "fingerprint" not in state:
            return "--data_pipeline no_dali"
        theirs, ours = {"orientation": "stored"} | state["fingerprint"], self.fingerprint()  # older states lack it
        changed = [key for key in ours if theirs.get(key) != ours[key]]
        return ", ".join(f"{key} {theirs.get(key)} (now {ours[key]})" for key in changed)

    def _run(self) -> dict[str, Tensor]:
        """The pipeline's next outputs by name; they share the pipeline's memory."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            outputs = self._started_pipeline().run(stream)
        except RuntimeError as error:
            raise self._broken_image_error(short_reason(error)) from None
        self._position += 1
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        return dict(zip(self._output_names, tensors, strict=True))

    def _next_batch(self) -> Batch:
        outputs = self._run()
        indices = self.image_indices[outputs["ids"].flatten().numpy()]
        # Boxes were scaled by the annotation file's sizes.
        differ = (outputs["sizes"][:, [1, 0]].numpy() != self.annotations.sizes[indices]).any(axis=1)
        for index in indices[differ]:
            read_image(self.annotations, index)
            raise size_error(self.annotations, index)
        if "first_and_last_bytes" in outputs:
            self._check_complete(indices, outputs["first_and_last_bytes"].numpy())
        images = outputs["images"].permute(0, 3, 1, 2)
        if self.augment:
            colour = copy_to_device(colour_matrix(*outputs["colour"].numpy().T), self.device)
            images = colour_and_normalise(images, colour, self.dtype)
        else:
            images = normalise(images, self.dtype)
        # The graph's boxes and labels are in the reverse order of the default boxes.
        return Batch(images, outputs["boxes"].flip(1), outputs["labels"].flip(1))

    def _check_complete(self, indices: np.ndarray, first_and_last_bytes: np.ndarray) -> None:
        """Raises DataError for a JPEG file that was cut short, judged by first_and_last_bytes [N, 4].

        A complete file with bytes after the picture looks the same, so files without the end marker are decoded once.
        """
        is_jpeg = (first_and_last_bytes[:, :2] == list(JPEG_START)).all(axis=1)
        lacks_end = (first_and_last_bytes[:, 2:] != list(JPEG_END)).any(axis=1)
        for index in indices[is_jpeg & lacks_end].tolist():
            if index not in self._complete_files:
                read_image(self.annotations, index)
                self._complete_files.add(index)

    # --- a broken image ---

    def _broken_image_error(self, reason: str) -> UserError:
        """The error that names the image on which DALI failed: DALI's own messages often do not."""
        position = self._position
        self.close()
        suspects = []
        try:
            self._require_files()
            suspects = self._images_after(position)
            for index in suspects:
                read_image(self.annotations, index)
            decode_check = DaliDecodeCheck(self.annotations, device=self.device, num_threads=self.num_threads)
            for error in decode_check.find_errors(suspects):
                return error
        except UserError as error:
            return error
        names = ", ".join(self.annotations.file_name(index) for index in suspects[: self.batch_size])
        where = f", perhaps on one of {names}: try" if names else ": have the images looked at (--mode check), or try"
        return UserError(f"DALI failed ({reason}){where} --data_pipeline no_dali")

    def _require_files(self) -> None:
        """Raises DataError for the first image whose file is missing, empty or not readable."""
        for index in self.image_indices:
            path = self.annotations.image_path(index)
            if not os.access(path, os.R_OK) or path.stat().st_size == 0:
                read_image(self.annotations, index)

    def _images_after(self, position: int) -> list[int]:
        """The images of the batches that DALI was preparing after `position` batches.

        A graph that reads the same images in the same order, without decoding them, finds them.  Empty after
        SEARCH_SECONDS: other processes would time out and report that instead of the image.
        """
        reader = self.build(("ids",))
        deadline = time.monotonic() + SEARCH_SECONDS
        for _ in range(position):
            reader.run()
            if time.monotonic() > deadline:
                return []
        ids = [torch.from_dlpack(reader.run()[0].as_tensor()).flatten() for _ in range(PREFETCH + 1)]
        return self.image_indices[torch.cat(ids).numpy()].tolist()


def _derived_seed(*parts: int) -> int:
    """A seed that differs whenever a part does; 63 bits, because DALI's seeds are signed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)
