"""A training batch, and the half of its making that works on a whole batch at once, on the device.

Shapes: N images, A = 8,732 default boxes, G ground-truth boxes of the fullest image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .default_boxes import default_boxes, default_boxes_ltrb, match

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of 0..1, red, green, blue
IMAGENET_STD = (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """What the network trains on, on the device, whichever pipeline made it."""

    images: Tensor  # [N, 3, 300, 300] normalised, channels last; float32 or float16
    boxes: Tensor  # [N, A, 4] cxcywh in 0..1: the ground truth matched to each default box, else the default box
    labels: Tensor  # [N, A] int64, 0 = background


class HostBatch(NamedTuple):
    """What the workers hand over: cropped, resized and flipped, in the host's memory."""

    images: Tensor  # [N, 3, 300, 300] uint8
    colour: Tensor  # [N, 3, 4] float32, one affine map of RGB in 0..255 an image
    boxes: Tensor  # [N, G, 4] float32 ltrb in 0..1, zeros beyond counts
    labels: Tensor  # [N, G] int64, 1..K
    counts: Tensor  # [N] int64, boxes of each image


class BatchMaker(nn.Module):
    """Turns a HostBatch into a Batch: colour, normalisation and matching for the whole batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the images that it gives."""
        super().__init__()
        self.dtype = dtype
        self.register_buffer("defaults", default_boxes().clone(), persistent=False)
        self.register_buffer("defaults_ltrb", default_boxes_ltrb(), persistent=False)

    @torch.no_grad()
    def forward(self, host: HostBatch) -> Batch:
        host = HostBatch(*(part.to(self.defaults.device, non_blocking=True) for part in host))
        images = normalise(change_colour(host.images, host.colour), self.dtype)
        boxes, labels = self.targets(host.boxes, host.labels, host.counts)
        return Batch(images, boxes, labels)

    def targets(self, boxes: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [N, A, 4] cxcywh and labels [N, A] for every default box, from padded ground truth as in HostBatch."""
        index = match(boxes, counts, self.defaults_ltrb)  # [N, A]
        if boxes.shape[1] == 0:
            return self.defaults.expand(len(boxes), -1, -1), torch.zeros_like(index)
        background = index < 0
        index = index.clamp(min=0)
        centred = box_convert(boxes, "xyxy", "cxcywh")
        matched = centred.gather(1, index[..., None].expand(-1, -1, 4))
        matched = torch.where(background[..., None], self.defaults, matched)
        return matched, labels.gather(1, index).masked_fill(background, 0)


def change_colour(images: Tensor, colour: Tensor) -> Tensor:
    """Applies one affine map of RGB an image and clips to 0..255, once; [N, 3, H, W] float32.

    images [N, 3, H, W] in 0..255; colour [N, 3, 4].
    """
    red, green, blue = images.float().unbind(dim=1)  # [N, H, W] each
    changed = torch.empty_like(images, dtype=torch.float32)
    for channel, weights in enumerate(colour.unbind(dim=1)):
        of_red, of_green, of_blue, offset = weights[..., None, None].unbind(dim=1)  # [N, 1, 1] each
        plane = torch.mul(red, of_red, out=changed[:, channel])
        plane.addcmul_(green, of_green).addcmul_(blue, of_blue).add_(offset)
    return changed.clamp_(0, 255)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in 0..255 with ImageNet's mean taken away and divided by its deviation; [N, 3, H, W], channels last."""
    mean = images.new_tensor(IMAGENET_MEAN, dtype=torch.float32).view(3, 1, 1) * 255
    deviation = images.new_tensor(IMAGENET_STD, dtype=torch.float32).view(3, 1, 1) * 255
    return images.float().sub(mean).div_(deviation).to(dtype, memory_format=torch.channels_last)
