"""The loss on the validation images, computed from the network outputs of an evaluation."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from src.data.annotations.coco import Annotations
from src.data.pipelines.batch import BatchMaker
from src.runtime.devices import copy_to_device
from src.ssd.loss import MultiBoxLoss

LOSS_NAMES = ("validation_loss", "validation_localisation_loss", "validation_label_loss")  # as in metrics.jsonl


class ValidationLoss:
    """Sums both parts of the loss over images with boxes; images without boxes have no loss."""

    def __init__(self, annotations: Annotations, device: torch.device) -> None:
        self.annotations = annotations
        self.device = device
        self._matcher = BatchMaker().to(device)
        self._criterion = MultiBoxLoss().to(device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # localisation and label part

    def add(self, offsets: Tensor, logits: Tensor, indices: np.ndarray) -> None:
        """Adds the losses of a batch.  offsets, logits: see `MultiBoxLoss.parts`.  indices: [N], in the annotations."""
        images = [self.annotations.targets(index) for index in indices.tolist()]
        rows = [row for row, (boxes, _) in enumerate(images) if len(boxes)]
        if not rows:
            return
        sizes = self.annotations.sizes[indices]
        boxes = np.concatenate([images[row][0] / np.tile(sizes[row], 2) for row in rows]).astype(np.float32)
        labels = np.concatenate([images[row][1] for row in rows])
        image_index = np.repeat(np.arange(len(rows)), [len(images[row][0]) for row in rows])
        truth_boxes, truth_labels, truth_images = (
            copy_to_device(array, self.device) for array in (boxes, labels, image_index)
        )
        matched = self._matcher.make_targets(truth_boxes, truth_labels, truth_images, len(rows))
        if len(rows) < len(indices):
            kept = copy_to_device(np.array(rows), self.device)
            offsets, logits = offsets[kept], logits[kept]
        parts = self._criterion.parts(offsets, logits, *matched)  # means over these images
        self._sums += torch.stack(parts).double() * len(rows)

    def sums(self) -> list[float]:
        """The sums of the localisation and the label part; waits for the device."""
        return self._sums.tolist()


def mean_losses(sums: Sequence[Sequence[float] | None], annotations: Annotations) -> dict[str, float | None] | None:
    """The losses by name, means over all images with boxes.  A value of None: not finite.

    sums: of each rank; None for a model that returns detections alone.  The result is then None, as without boxes.
    """
    images = len(annotations.with_boxes())
    known = [each for each in sums if each is not None]
    if not images or len(known) < len(sums):
        return None
    localisation, label = (math.fsum(part) / images for part in zip(*known, strict=True))
    values = (localisation + label, localisation, label)
    return {name: value if math.isfinite(value) else None for name, value in zip(LOSS_NAMES, values, strict=True)}
