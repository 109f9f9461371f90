"""A training batch, and the half of its making that works on a whole batch at once, on the device.

Shapes: N images, A = 8,732 default boxes, T ground-truth boxes of all images.
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
    boxes: Tensor  # [T, 4] float32 ltrb in 0..1, of all images
    labels: Tensor  # [T] int64, 1..K
    owners: Tensor  # [T] int64: the image that each box belongs to


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
        images = torch.empty_like(host.images, dtype=self.dtype, memory_format=torch.channels_last)
        # A CPU's cache holds the planes of one image; a GPU wants all at once.
        chunk = 1 if images.device.type == "cpu" else len(images)
        for done, raw, colour in zip(*(x.split(chunk) for x in (images, host.images, host.colour)), strict=True):
            done.copy_(coloured(raw, colour))
        return Batch(images, *self.targets(host.boxes, host.labels, host.owners, len(images)))

    def targets(self, boxes: Tensor, labels: Tensor, owners: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """Boxes [N, A, 4] cxcywh and labels [N, A] for every default box, from the ground truth of N images."""
        index = match(boxes, owners, images, self.defaults_ltrb)  # [N, A]
        # A place more, for what is matched to nothing: index -1 is the last.
        boxes = torch.cat((box_convert(boxes, "xyxy", "cxcywh"), boxes.new_zeros(1, 4)))
        labels = torch.cat((labels, labels.new_zeros(1)))[index]
        return torch.where((index < 0)[..., None], self.defaults, boxes[index]), labels


def coloured(images: Tensor, colour: Tensor) -> Tensor:
    """Images after the colour step, normalised with ImageNet's mean and deviation; [N, 3, H, W] float32.

    images [N, 3, H, W] in 0..255; colour [N, 3, 4]: an affine map of RGB, whose results are clipped to 0..255, once.
    Both steps are one affine map here, and 0 and 255 are clipped to where normalisation takes them.
    """
    red, green, blue = images.float().unbind(dim=1)  # [N, H, W] each
    result = torch.empty_like(images, dtype=torch.float32)
    for channel, (mean, deviation) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        weights = colour[:, channel, :, None, None] / (255 * deviation)  # [N, 4, 1, 1]
        of_red, of_green, of_blue, offset = weights.unbind(dim=1)
        plane = torch.addcmul(offset - mean / deviation, red, of_red, out=result[:, channel])
        plane.addcmul_(green, of_green).addcmul_(blue, of_blue)
        plane.clamp_(-mean / deviation, (1 - mean) / deviation)
    return result


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in 0..255 with ImageNet's mean taken away and divided by its deviation; [N, 3, H, W], channels last."""
    mean = images.new_tensor(IMAGENET_MEAN, dtype=torch.float32).view(3, 1, 1) * 255
    deviation = images.new_tensor(IMAGENET_STD, dtype=torch.float32).view(3, 1, 1) * 255
    return images.float().sub(mean).div_(deviation).to(dtype, memory_format=torch.channels_last)
