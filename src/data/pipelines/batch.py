"""A training batch, and its last steps for the whole batch on the device: colours, normalisation, matching.

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
PIXELS_PER_MATMUL = 10  # the 3 x 3 matrices of single pixels are too small to be multiplied fast


class Batch(NamedTuple):
    """A training batch on the device, the same from both pipelines."""

    images: Tensor  # [N, 3, 300, 300] normalised, channels last; float32 or float16
    boxes: Tensor  # [N, A, 4] cxcywh in 0..1: the ground truth matched to each default box, else the default box
    labels: Tensor  # [N, A] int64, 0 = background


class HostBatch(NamedTuple):
    """A batch as the workers make it: cropped, resized and flipped, in the host's memory."""

    images: Tensor  # [N, 3, 300, 300] uint8
    colour: Tensor  # [N, 3, 4] float32, an affine map of RGB in 0..255 for each image
    boxes: Tensor  # [T, 4] float32 ltrb in 0..1, of all images
    labels: Tensor  # [T] int64, 1..K
    image_index: Tensor  # [T] int64: the image in 0..N-1 of each box


class BatchMaker(nn.Module):
    """Turns a HostBatch into a Batch: colour, normalisation and matching for the whole batch."""

    defaults: Tensor  # [A, 4] cxcywh
    defaults_ltrb: Tensor  # [A, 4]

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the batch's images."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("defaults", default_boxes().clone(), persistent=False)
        self.register_buffer("defaults_ltrb", default_boxes_ltrb(), persistent=False)

    @torch.no_grad()
    def forward(self, host: HostBatch) -> Batch:
        host = HostBatch(*(part.to(self.defaults.device, non_blocking=True) for part in host))
        images = colour_and_normalise(host.images, host.colour, self.dtype)
        return Batch(images, *self.make_targets(host.boxes, host.labels, host.image_index, len(images)))

    def make_targets(
        self, boxes: Tensor, labels: Tensor, image_index: Tensor, num_images: int
    ) -> tuple[Tensor, Tensor]:
        """Boxes [N, A, 4] cxcywh and labels [N, A] of every default box, for the ground truth of N images.

        boxes [T, 4] ltrb in 0..1, labels [T], image_index [T].  An unmatched default box gets itself and label 0.
        """
        index = match(boxes, image_index, num_images, self.defaults_ltrb)  # [N, A]
        # The default boxes follow the ground truth below, so that one indexing gives both.
        itself = torch.arange(len(boxes), len(boxes) + len(self.defaults), device=index.device)
        index = torch.where(index < 0, itself, index)
        boxes = torch.cat((box_convert(boxes, "xyxy", "cxcywh"), self.defaults))
        labels = torch.cat((labels, labels.new_zeros(len(self.defaults))))
        return boxes[index], labels[index]


def colour_and_normalise(images: Tensor, colour: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images with changed colours, normalised with ImageNet's mean and deviation; [N, 3, H, W], channels last.

    images [N, 3, H, W] in 0..255, H x W a multiple of PIXELS_PER_MATMUL; colour [N, 3, 4]: an affine map of RGB, whose
    results are clipped to 0..255.  Both steps are one affine map here, followed by clipping to normalised 0 and 255.
    """
    mean, deviation = _mean_and_deviation(colour.device)
    affine = colour / (255 * deviation[:, None])  # [N, 3, 4]
    offsets = affine[:, None, :, 3] - mean / deviation  # [N, 1, 3]
    offsets, matrices = offsets.repeat(1, 1, PIXELS_PER_MATMUL), _block_diagonal(affine[..., :3].mT, PIXELS_PER_MATMUL)
    num_images, channels, height, width = images.shape
    black, white = _black_and_white(width, colour.device)

    pixels = images.permute(0, 2, 3, 1).reshape(num_images, -1, channels * PIXELS_PER_MATMUL)
    result = torch.empty_like(pixels, dtype=torch.float32)
    # An image fits a CPU's cache; on a GPU a chunk costs kernel launches.
    chunk = 1 if images.device.type == "cpu" else num_images
    chunks = zip(*(x.split(chunk) for x in (result, pixels, matrices, offsets)), strict=True)
    with full_float32_products():  # TF32 would change pixels by 0.002 of a deviation
        for changed, unchanged, matrix, offset in chunks:
            torch.baddbmm(offset, unchanged.float(), matrix, out=changed)
            changed.view(-1, height, width * channels).clamp_(black, white)
    return result.view(num_images, height, width, channels).permute(0, 3, 1, 2).to(dtype)


def _black_and_white(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A black and a white row of a normalised picture, the limits of clipping; [width x 3] each, pixel by pixel."""
    mean, deviation = _mean_and_deviation(device)
    return (-mean / deviation).repeat(width), ((1 - mean) / deviation).repeat(width)


@lru_cache
def _mean_and_deviation(device: torch.device) -> Tensor:
    """ImageNet's mean and deviation, [2, 3]; cached, because copying them to a GPU waits for it."""
    return torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=device)


def _block_diagonal(matrices: Tensor, times: int) -> Tensor:
    """Each matrix of [N, I, O] repeated along the diagonal of a larger one; [N, times x I, times x O]."""
    count, rows, columns = matrices.shape
    blocks = torch.eye(times, device=matrices.device)[:, None, :, None] * matrices[:, None, :, None, :]
    return blocks.reshape(count, times * rows, times * columns)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in 0..255 normalised with ImageNet's mean and deviation; [N, 3, H, W], channels last."""
    return colour_and_normalise(images, torch.eye(3, 4, device=images.device).expand(len(images), -1, -1), dtype)


def denormalise(images: Tensor) -> Tensor:
    """Normalised images as RGB in 0..255, the inverse of `normalise`; [N, 3, H, W]."""
    mean, deviation = _mean_and_deviation(images.device)[..., None, None]  # [3, 1, 1] each
    return (images * deviation + mean) * 255
