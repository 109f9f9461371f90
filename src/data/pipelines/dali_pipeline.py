"""The DALI training pipeline (`--data_pipeline dali`): the loader around the graph of dali_graph.py.

The graph gets the cleaned annotations in files of our own. DALI keeps its own generators, so the position
of this pipeline is DALI's checkpoint, kept beside the settings for which alone it is valid.
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
from src.data.images.decode import is_text
from src.data.pipelines.augment import colour_matrix
from src.data.pipelines.batch import Batch, coloured, normalise
from src.data.pipelines.dali_decode_check import DaliDecodeCheck, wrong_size
from src.data.pipelines.dali_files import write_clean_file, write_reader_files
from src.data.pipelines.dali_graph import (
    AUGMENTED,
    ON_GPU,
    OUTPUTS,
    PREFETCH,
    VERSIONS,
    Settings,
    cause,
    dali,
    device_index,
    make_pipeline,
)
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loader_config import LoaderConfig
from src.runtime.errors import UserError
from src.runtime.output_files import convert_write_errors

SEARCH_LIMIT = 60  # seconds of looking for the image on which DALI has failed; other processes wait for twice as long
JPEG = (0xFF, 0xD8), (0xFF, 0xD9)  # how such a file begins and ends


class DaliTrainLoader:
    """The training loader of `--data_pipeline dali`; see design: train loader.

    One DALI pipeline runs on from epoch to epoch; it is built when first needed. `warnings` has a line for each state
    that could not be taken over.
    """

    def __init__(self, annotations: Annotations, config: LoaderConfig, *, augment: bool = True) -> None:
        self.annotations = annotations
        self.images = annotations.with_boxes()  # the graph's image id -> index in the annotations
        self.num_images = len(self.images)
        self.batch_size = config.batch_size
        self.device = config.device
        self.dtype = config.dtype
        self.seed = config.seed
        self.rank, self.world_size = config.shard
        self.num_threads = max(1, config.num_workers)
        self.augment = augment
        self.warnings: list[str] = []
        self._outputs = (*OUTPUTS, *(AUGMENTED if augment else ()), *(ON_GPU if config.device.type == "cuda" else ()))
        self._whole: set[int] = set()  # images whose files end in an odd way and were read to their end
        self._pipeline: dali.Pipeline | None = None
        self._first_epoch = 0  # where the pipeline started
        self._position = 0  # batches handed out since

    def __len__(self) -> int:
        """Iterations an epoch, the same on every process."""
        share = -(-self.num_images // self.world_size)
        return -(-share // self.batch_size)

    def set_epoch(self, epoch: int, start_iteration: int = 0) -> None:
        """The next pass is that of `epoch` from its iteration `start_iteration` on.

        Where the pipeline does not stand there, another is started, which depends on seed, epoch and rank alone, and
        the iterations before are passed over.
        """
        if self._pipeline is not None and self._position == self._position_of(epoch, start_iteration):
            return
        self._start(epoch)
        for _ in range(start_iteration):
            self._run()

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present position to the end of its epoch."""
        self._started()
        for _ in range(len(self) - self._position % len(self)):
            yield self._next_batch()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out: DALI's checkpoint and what it is valid for."""
        return {
            "checkpoint": self._started().checkpoint(),
            "first_epoch": self._first_epoch,
            "position": self._position,
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any], *, epoch: int, iteration: int) -> None:
        """Continues where `state` was taken, which was in `epoch` after `iteration` of its iterations.

        Raises UserError where the state is of other settings or of another pipeline and the epoch had begun; between
        epochs `warnings` tells of it and the next pass starts afresh.
        """
        differences = self._differences(state)
        if not differences:
            self._start(state["first_epoch"], state["checkpoint"])
            self._position = state["position"]
            assert self._position == self._position_of(epoch, iteration)
            return
        if iteration % len(self):
            raise UserError(
                f"cannot continue inside epoch {epoch}: the checkpoint was written with {differences}: continue with "
                "what it was written with, or from a checkpoint of an epoch's end"
            )
        self.close()
        self._first_epoch, self._position = epoch + iteration // len(self), 0
        self.warnings.append(f"the checkpoint was written with {differences}: the DALI pipeline starts afresh")

    def fingerprint(self) -> dict[str, Any]:
        """The settings that a state is valid for; plain values."""
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
        """Ends the pipeline's threads and frees its memory; a later pass starts another."""
        self._pipeline = None
        gc.collect()  # DALI's pipeline objects are parts of reference cycles

    def build(self, outputs: tuple[str, ...], checkpoint: bytes | None = None) -> dali.Pipeline:
        """A pipeline of this loader's settings that gives these nodes of the graph; see `make_pipeline`."""
        if not is_text(self.annotations.image_folder):
            read_image(self.annotations, int(self.images[0]))  # raises: DALI would not name the path
        with tempfile.TemporaryDirectory(prefix="ssd300-") as folder:
            annotations, names = self._write_annotations(Path(folder))
            try:
                return make_pipeline(
                    self._settings(),
                    annotations,
                    self.annotations.image_folder,
                    names,
                    outputs=outputs,
                    checkpoint=checkpoint,
                )
            except RuntimeError as error:
                too_large = re.search("batch size|memory|alloc", reason := cause(error), re.IGNORECASE)
                remedy = "lower --batch-size" if too_large else "use --data_pipeline no_dali"
                raise UserError(f"DALI cannot start ({reason}): {remedy}") from None

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
        """What the graph reads, written into the folder, and the file names where it must be told of their order."""
        order = self._first_order()
        with convert_write_errors(folder):
            if write_reader_files(self.annotations, order, folder):
                return folder, None
            annotation_file = folder / "annotations.json"
            write_clean_file(self.annotations, annotation_file)
        return annotation_file, [self.annotations.file_name(index) for index in order.tolist()]

    def _first_order(self) -> np.ndarray:
        """The images in the order of the first pass; at least one a process, which is what DALI wants."""
        order = np.random.default_rng([self.seed, self._first_epoch]).permutation(self.images)
        return np.resize(order, max(len(order), self.world_size))

    def _position_of(self, epoch: int, iteration: int) -> int:
        return (epoch - self._first_epoch) * len(self) + iteration

    def _started(self) -> dali.Pipeline:
        return self._start(self._first_epoch) if self._pipeline is None else self._pipeline

    def _start(self, epoch: int, checkpoint: bytes | None = None) -> dali.Pipeline:
        self.close()
        self._first_epoch, self._position = epoch, 0
        self._pipeline = self.build(self._outputs, checkpoint)
        return self._pipeline

    def _differences(self, state: dict[str, Any]) -> str:
        """How the settings that a state was taken under differ from these, in words."""
        if "fingerprint" not in state:
            return "--data_pipeline no_dali"
        theirs, ours = {"orientation": "stored"} | state["fingerprint"], self.fingerprint()  # older ones do not say it
        changed = [key for key in ours if theirs.get(key) != ours[key]]
        return ", ".join(f"{key} {theirs.get(key)} (now {ours[key]})" for key in changed)

    def _run(self) -> dict[str, Tensor]:
        """The pipeline's next outputs by name, in memory that it shares with them."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            outputs = self._started().run(stream)
        except RuntimeError as error:
            raise self._explained(cause(error)) from None
        self._position += 1
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        return dict(zip(self._outputs, tensors, strict=True))

    def _next_batch(self) -> Batch:
        outputs = self._run()
        indices = self.images[outputs["ids"].flatten().numpy()]
        wrong = (outputs["sizes"][:, [1, 0]].numpy() != self.annotations.sizes[indices]).any(axis=1)
        for index in indices[wrong]:  # boxes were scaled by the annotation file's sizes
            read_image(self.annotations, index)
            raise wrong_size(self.annotations, index)
        if "ends" in outputs:
            self._check_ends(indices, outputs["ends"].numpy())
        images = outputs["images"].permute(0, 3, 1, 2)
        if self.augment:
            images = coloured(images, self._on_device(colour_matrix(*outputs["colour"].numpy().T)), self.dtype)
        else:
            images = normalise(images, self.dtype)
        # The graph matches to the default boxes in reverse order.
        return Batch(images, outputs["boxes"].flip(1), outputs["labels"].flip(1))

    def _check_ends(self, indices: np.ndarray, ends: np.ndarray) -> None:
        """Raises DataError for a JPEG file that was cut short, by `ends`, the first and last two bytes of each, [N, 4].

        A file with something behind its picture ends like one that was cut short, and is read once to tell.
        """
        start, end = JPEG
        odd = (ends[:, :2] == start).all(axis=1) & (ends[:, 2:] != end).any(axis=1)
        for index in indices[odd].tolist():
            if index not in self._whole:
                read_image(self.annotations, index)
                self._whole.add(index)

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # which copies without holding up the host from pinned memory alone
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    # --- a broken image ---

    def _explained(self, reason: str) -> UserError:
        """The error to raise for one of DALI's, which often do not say which image could not be read."""
        position = self._position
        self.close()
        suspects = []
        try:
            self._open_all()
            suspects = self._images_after(position)
            for index in suspects:
                read_image(self.annotations, index)
            trial = DaliDecodeCheck(self.annotations, device=self.device, num_threads=self.num_threads)
            for fault in trial.faults(suspects):
                return fault
        except UserError as error:
            return error
        names = ", ".join(self.annotations.file_name(index) for index in suspects[: self.batch_size])
        where = f", perhaps on one of {names}: try" if names else ": have the images looked at (--mode check), or try"
        return UserError(f"DALI failed ({reason}){where} --data_pipeline no_dali")

    def _open_all(self) -> None:
        """Raises DataError for the first image whose file is not there, empty or not to be opened."""
        for index in self.images:
            path = self.annotations.image_path(index)
            if not os.access(path, os.R_OK) or path.stat().st_size == 0:
                read_image(self.annotations, index)

    def _images_after(self, position: int) -> list[int]:
        """The images of the batches that were being prepared, from a graph that reads as before and decodes nothing.

        Empty where that takes so long that the other processes would give this one up, and tell of that instead.
        """
        reader = self.build(("ids",))
        deadline = time.monotonic() + SEARCH_LIMIT
        for _ in range(position):
            reader.run()
            if time.monotonic() > deadline:
                return []
        ids = [torch.from_dlpack(reader.run()[0].as_tensor()).flatten() for _ in range(PREFETCH + 1)]
        return self.images[torch.cat(ids).numpy()].tolist()


def _derived_seed(*parts: int) -> int:
    """A seed that other parts give another of; DALI's are signed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)
