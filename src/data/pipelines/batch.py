"""A training batch, and the half of its making that works on a whole batch at once, on the device.

Shapes: N images, A = 8,732 default boxes, T ground-truth boxes of all images.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from src.runtime.precision import full_float32_products
from src.ssd.default_boxes import default_boxes, default_boxes_ltrb, match

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of 0..1, red, green, blue
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXELS_PER_MATMUL = 10  # changed by one product of matrices: those of one pixel, 3 x 3, are too small to be fast


class Batch(NamedTuple):
    """What the network trains on, on the device, whichever pipeline made it."""

    images: Tensor  # [N, 3, 300, 300] normalised, channels last; float32 or float16
    boxes: Tensor  # [N, A, 4] cxcywh in 0..1: the ground truth matched to each default box, else the default box
    labels: Tensor  # [N, A] int64, 0 = background


class HostBatch(NamedTuple):
    """What the workers hand over: cropped, resized and flipped, in the host's memory."""

    images: Tensor  # [N, 3, 300, 300] uint8
    colour: Tensor  # [N, 3, 4] float32, one affine map of RGB in 0..255 an image
    boxes: Tensor  # [T, 4] float32 ltrb in 0..1, of all images
    labels: Tensor  # [T] int64, 1..K
    owners: Tensor  # [T] int64: the image that each box belongs to


class BatchMaker(nn.Module):
    """Turns a HostBatch into a Batch: colour, normalisation and matching for the whole batch."""

    defaults: Tensor  # [A, 4] cxcywh
    defaults_ltrb: Tensor  # [A, 4]

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the images that it gives."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("defaults", default_boxes().clone(), persistent=False)
        self.register_buffer("defaults_ltrb", default_boxes_ltrb(), persistent=False)

    @torch.no_grad()
    def forward(self, host: HostBatch) -> Batch:
        host = HostBatch(*(part.to(self.defaults.device, non_blocking=True) for part in host))
        images = coloured(host.images, host.colour, self.dtype)
        return Batch(images, *self.targets(host.boxes, host.labels, host.owners, len(images)))

    def targets(self, boxes: Tensor, labels: Tensor, owners: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """Boxes [N, A, 4] cxcywh and labels [N, A] for every default box, from the ground truth of N images."""
        index = match(boxes, owners, images, self.defaults_ltrb)  # [N, A]
        # A default box that is matched to nothing takes itself from behind the ground truth, with label 0.
        itself = torch.arange(len(boxes), len(boxes) + len(self.defaults), device=index.device)
        index = torch.where(index < 0, itself, index)
        boxes = torch.cat((box_convert(boxes, "xyxy", "cxcywh"), self.defaults))
        labels = torch.cat((labels, labels.new_zeros(len(self.defaults))))
        return boxes[index], labels[index]


def coloured(images: Tensor, colour: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images after the colour step, normalised with ImageNet's mean and deviation; [N, 3, H, W], channels last.

    images [N, 3, H, W] in 0..255, H x W a multiple of PIXELS_TOGETHER; colour [N, 3, 4]: an affine map of RGB, whose
    results are clipped to 0..255, once.  Both steps are one affine map here, and 0 and 255 are clipped to where
    normalisation takes them.
    """
    mean, deviation = _statistics(colour.device)
    affine = colour / (255 * deviation[:, None])  # [N, 3, 4]
    offsets = affine[:, None, :, 3] - mean / deviation  # [N, 1, 3]
    offsets, matrices = offsets.repeat(1, 1, PIXELS_PER_MATMUL), _block_diagonal(affine[..., :3].mT, PIXELS_PER_MATMUL)
    number, channels, height, width = images.shape
    least, greatest = black_and_white(width, colour.device)

    pixels = images.permute(0, 2, 3, 1).reshape(number, -1, channels * PIXELS_PER_MATMUL)
    result = torch.empty_like(pixels, dtype=torch.float32)
    # A CPU's cache holds one image; a GPU wants all at once.
    chunk = 1 if images.device.type == "cpu" else number
    parts = zip(*(x.split(chunk) for x in (result, pixels, matrices, offsets)), strict=True)
    with full_float32_products():  # TF32 would change pixels by 0.002 of a deviation
        for done, raw, matrix, offset in parts:
            torch.baddbmm(offset, raw.float(), matrix, out=done)
            done.view(-1, height, width * channels).clamp_(least, greatest)
    return result.view(number, height, width, channels).permute(0, 3, 1, 2).to(dtype)


def black_and_white(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A black and a white row of a normalised picture, to clip to; [3 x width] each, pixel after pixel."""
    mean, deviation = _statistics(device)
    return (-mean / deviation).repeat(width), ((1 - mean) / deviation).repeat(width)


@lru_cache
def _statistics(device: torch.device) -> Tensor:
    """ImageNet's mean and deviation, [2, 3]; copied to a GPU once, because that waits for it."""
    return torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=device)


def _block_diagonal(matrices: Tensor, times: int) -> Tensor:
    """Each matrix [I, O] of [N, I, O] repeated along the diagonal of one that is zero elsewhere; [N, x I, x O]."""
    number, rows, columns = matrices.shape
    blocks = torch.eye(times, device=matrices.device)[:, None, :, None] * matrices[:, None, :, None, :]
    return blocks.reshape(number, times * rows, times * columns)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in 0..255 with ImageNet's mean taken away and divided by its deviation; [N, 3, H, W], channels last."""
    return coloured(images, torch.eye(3, 4, device=images.device).expand(len(images), -1, -1), dtype)
