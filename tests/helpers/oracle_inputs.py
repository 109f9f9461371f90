"""The oracle's inputs, made again from their seeds, and random network output like them."""

import numpy as np
import torch
from torch import Tensor, nn

NUM_DEFAULT_BOXES = 8732
ORACLE_CASES = {  # seed, sigma, background
    "few": (101, 1.0, 9.0),
    "full": (102, 1.0, 6.0),
    "confident": (103, 4.0, 12.0),
    "crowded": (104, 4.0, 8.0),
    "nothing": (105, 1.0, 14.0),
}


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


def oracle_output(case: str) -> tuple[Tensor, Tensor]:
    """Offsets [1, 4, A] and logits [1, 81, A] of a case of the oracle's decode.npz."""
    seed, sigma, background = ORACLE_CASES[case]
    rng = np.random.default_rng(seed)
    offsets = rng.standard_normal((4, NUM_DEFAULT_BOXES), dtype=np.float32)
    logits = np.float32(sigma) * rng.standard_normal((81, NUM_DEFAULT_BOXES), dtype=np.float32)
    logits[0] += np.float32(background)
    return torch.from_numpy(offsets)[None], torch.from_numpy(logits)[None]


def random_output(images: int, labels: int, *, seed: int = 0, sigma: float = 4.0, background: float = 8.0):
    """Offsets [N, 4, A] and logits [N, C, A]; by default crowded ones."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(images, 4, NUM_DEFAULT_BOXES, generator=generator)
    logits = sigma * torch.randn(images, labels, NUM_DEFAULT_BOXES, generator=generator)
    logits[:, 0] += background
    return offsets, logits
