"""A detector of a few channels in SSD300's place, for runs whose network does not matter: a step takes milliseconds.

Where a launcher starts the processes, `-m tests.helpers.launch` puts it there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor, nn

CHANNELS = 16  # of every feature map
HIDDEN = 8  # of the extra blocks


class _Features(nn.Module):
    """300 x 300 to 38 x 38 in one convolution."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(3, CHANNELS, kernel_size=7, stride=8, padding=3, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.feature_extractor(images)


@contextmanager
def use_tiny_model() -> Iterator[None]:
    """Inside, every SSD300 that is made has few channels; heads, default boxes and buffers stay as they are."""
    with mock.patch.multiple(
        "src.ssd.model",
        FeatureExtractor=_Features,
        feature_channels=lambda backbone: (CHANNELS,) * 6,
        HIDDEN_CHANNELS=(HIDDEN,) * 5,
    ):
        yield
