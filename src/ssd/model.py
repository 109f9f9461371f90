"""SSD300 on a ResNet: backbone, extra blocks and heads.  Module names are those of the published checkpoints.

Shapes: N images, C labels with the background, A = 8,732 default boxes.
Sources: Liu et al. 2016, section 2.1; He et al. 2016 for the ResNet.
"""

from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

from src.ssd.default_boxes import BOXES_PER_CELL

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
LAYERS_KEPT = 7  # of torchvision's ResNet: up to layer3
HIDDEN_CHANNELS = (256, 256, 128, 128, 128)  # of the extra blocks, between their two convolutions
FIRST_PADDED_BLOCKS = 3  # these halve the map with stride 2; the last two shrink it by an unpadded 3 x 3 convolution


class FeatureExtractor(nn.Module):
    """A ResNet up to layer3, whose first block keeps its stride at 1: 300 x 300 gives 38 x 38."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        resnet = models.get_model(backbone, weights=None)
        *layers, last = list(resnet.children())[:LAYERS_KEPT]
        self.feature_extractor = nn.Sequential(*layers, last)
        first = last[0]
        for layer in (first.conv1, first.conv2, first.downsample[0]):
            layer.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.feature_extractor(images)


class SSD300(nn.Module):
    """The detector.

    `forward(images [N, 3, 300, 300], normalised)` gives (offsets [N, 4, A], logits [N, C, A]) in the order of
    `default_boxes()`.
    """

    def __init__(self, backbone: str, num_labels: int) -> None:
        """num_labels: C, the categories and the background."""
        super().__init__()
        self.num_labels = num_labels
        self.feature_extractor = FeatureExtractor(backbone)
        channels = feature_channels(backbone)
        self.additional_blocks = nn.ModuleList(
            _extra_block(channels[k], HIDDEN_CHANNELS[k], channels[k + 1], halve=k < FIRST_PADDED_BLOCKS)
            for k in range(len(HIDDEN_CHANNELS))
        )
        self.loc = _heads(channels, 4)
        self.conf = _heads(channels, num_labels)
        self.backbone_is_frozen = False
        self._initialise()

    def freeze_backbone(self) -> None:
        """Keeps the backbone's weights and batch-norm statistics as they are, in training too."""
        self.backbone_is_frozen = True
        self.feature_extractor.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SSD300":
        super().train(mode)
        if self.backbone_is_frozen:
            self.feature_extractor.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = [self.feature_extractor(images)]
        for block in self.additional_blocks:
            features.append(block(features[-1]))
        return _predict(self.loc, features, 4), _predict(self.conf, features, self.num_labels)

    def _initialise(self) -> None:
        """Xavier-uniform weights in everything that is not the backbone, as the published model has it."""
        for module in (*self.additional_blocks, *self.loc, *self.conf):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)


def feature_channels(backbone: str) -> tuple[int, ...]:
    """Channels of the six feature maps."""
    first = 256 if backbone in ("resnet18", "resnet34") else 1024
    last = 128 if backbone == "resnet18" else 256
    return (first, 512, 512, 256, 256, last)


def training_memory_format(backbone: str, device: torch.device) -> torch.memory_format:
    """The layout of weights and images in memory in which training is fastest.

    Channels last, but for the smaller networks on a CPU with AVX2 alone: oneDNN computes the gradients of their 3 x 3
    convolutions a tenth faster there with channels first.  In an evaluation channels last is faster everywhere.
    """
    small = feature_channels(backbone)[0] < 1024
    on_avx2 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if small and on_avx2 else torch.channels_last


def _extra_block(inputs: int, hidden: int, outputs: int, *, halve: bool) -> nn.Sequential:
    stride, padding = (2, 1) if halve else (1, 0)
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, kernel_size=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, kernel_size=3, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _heads(channels: tuple[int, ...], values: int) -> nn.ModuleList:
    """One 3 x 3 convolution a feature map, `values` numbers for each of its default boxes."""
    return nn.ModuleList(
        nn.Conv2d(inputs, boxes * values, kernel_size=3, padding=1)
        for inputs, boxes in zip(channels, BOXES_PER_CELL, strict=True)
    )


def _predict(heads: nn.ModuleList, features: list[Tensor], values: int) -> Tensor:
    """Every head's output viewed as [N, values, cells x boxes] and concatenated; [N, values, A]."""
    outputs = [head(feature) for head, feature in zip(heads, features, strict=True)]
    return torch.cat([output.reshape(output.shape[0], values, -1) for output in outputs], dim=2)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy for inference, its batch-norms folded into the convolutions before them; the model itself without any.

    The copy has channels last.

    It is for modules that apply their children in the order in which they have them, as far as those are convolutions
    and batch-norms: torchvision's ResNets and the network here.
    """
    if not any(_folding_pairs(module) for module in model.modules()):
        return model
    copy = deepcopy(model).eval()
    for module in list(copy.modules()):
        for convolution, norm in _folding_pairs(module):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())
    return copy.to(memory_format=torch.channels_last)


def _folding_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of the module's convolutions that a batch-norm follows, and of that."""
    children = list(module.named_children())
    return [
        (name, following)
        for (name, child), (following, next_child) in pairwise(children)
        if isinstance(child, nn.Conv2d) and isinstance(next_child, nn.BatchNorm2d)
    ]
