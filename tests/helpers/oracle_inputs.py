"""The oracle's inputs, rebuilt by the recipes of its README."""

import numpy as np
import torch
from torch import Tensor, nn


def loss_inputs(seed: int, counts: list[int], default_boxes: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets [N, 4, A], logits [N, 81, A], boxes [N, A, 4] and labels [N, A]."""
    rng = np.random.default_rng(seed)
    images = len(counts)
    offsets = rng.standard_normal((images, 4, 8732), dtype=np.float32)
    logits = rng.standard_normal((images, 81, 8732), dtype=np.float32)
    boxes = np.repeat(default_boxes[None], images, 0).copy()
    labels = np.zeros((images, 8732), np.int64)
    for image, count in enumerate(counts):
        positive = np.sort(rng.choice(8732, count, replace=False))
        labels[image, positive] = rng.integers(1, 81, count)
        boxes[image, positive] *= (1 + 0.1 * rng.uniform(-1, 1, (count, 4))).astype(np.float32)
    return tuple(torch.from_numpy(array) for array in (offsets, logits, boxes, labels))


@torch.no_grad()
def fill_weights(model: nn.Module) -> nn.Module:
    """The oracle's weights, in place."""
    rng = np.random.default_rng(7)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            fan = np.prod(tensor.shape[1:])
            values = rng.standard_normal(tuple(tensor.shape), dtype=np.float32) * np.float32(np.sqrt(1.0 / fan))
            tensor.copy_(torch.from_numpy(values))
        else:
            tensor.fill_(0 if name.endswith(("running_mean", "bias")) else 1)
    return model


def images() -> Tensor:
    """[2, 3, 300, 300]."""
    return torch.from_numpy(np.random.default_rng(8).standard_normal((2, 3, 300, 300), dtype=np.float32))


def quiet_output(images: int = 1, labels: int = 3) -> tuple[Tensor, Tensor]:
    """Default boxes that detect nothing, for a test to write into."""
    logits = torch.zeros(images, labels, 8732)
    logits[:, 0] = 20
    return torch.zeros(images, 4, 8732), logits
