"""The multibox loss of SSD with hard negative mining.  Liu et al. 2016, section 2.2.

Shapes: N images, C labels with the background, A = 8,732 default boxes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.ssd.default_boxes import default_boxes, encode

NEGATIVES_PER_POSITIVE = 3


class LossParts(NamedTuple):
    """Scalar tensors on the device; their sum is the multibox loss."""

    localisation: Tensor
    label: Tensor


class MultiBoxLoss(nn.Module):
    """Smooth L1 over the matched default boxes plus cross-entropy over those and the hardest negatives."""

    defaults: Tensor  # [A, 4] cxcywh

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("defaults", default_boxes().clone(), persistent=False)

    def forward(self, offsets: Tensor, logits: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar; 0 with a gradient of 0 if nothing is matched.  Arguments as for `parts`."""
        parts = self.parts(offsets, logits, boxes, labels)
        return parts.localisation + parts.label

    def parts(self, offsets: Tensor, logits: Tensor, boxes: Tensor, labels: Tensor) -> LossParts:
        """Both parts: each image's sum divided by its number of matched default boxes, averaged over the images.

        offsets [N, 4, A] and logits [N, C, A] from the network; boxes [N, A, 4] cxcywh in 0..1 and labels [N, A] int64,
        0 = background, from the batch.
        """
        positive = labels > 0  # [N, A]
        count = positive.sum(dim=1)  # [N]
        target = encode(boxes.float(), self.defaults).transpose(1, 2)  # [N, 4, A]
        distance = F.smooth_l1_loss(offsets.float(), target, reduction="none", beta=1.0).sum(dim=1)  # [N, A]
        # Not a product, because 0 times the infinite distance of a background box is NaN.
        localisation = torch.where(positive, distance, 0).sum(dim=1)
        cross_entropy = F.cross_entropy(logits.float(), labels, reduction="none")  # [N, A]
        chosen = positive | mine_hard_negatives(cross_entropy.detach(), positive, count)
        label = torch.where(chosen, cross_entropy, 0).sum(dim=1)
        weight = torch.where(count > 0, 1 / count.clamp(min=1), 0) / len(labels)  # [N]
        return LossParts((localisation * weight).sum(), (label * weight).sum())


def mine_hard_negatives(cross_entropy: Tensor, positive: Tensor, count: Tensor) -> Tensor:
    """The background boxes with the largest loss, three for each positive of the image; [N, A] bool.

    cross_entropy [N, A] without gradient, positive [N, A] bool, count [N] = positives of each image.
    """
    candidates = cross_entropy.masked_fill(positive, -1)  # cross-entropy is never below 0
    order = candidates.argsort(dim=1, descending=True, stable=True)  # [N, A]
    wanted = torch.minimum(NEGATIVES_PER_POSITIVE * count, (~positive).sum(dim=1))  # never a positive twice
    taken = torch.arange(order.shape[1], device=order.device) < wanted[:, None]  # [N, A], by rank
    return torch.zeros_like(positive).scatter_(1, order, taken)
