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
FIRST_PADDED_BLOCKS = 3  # these have stride 2; the last two have an unpadded 3 x 3 convolution


class FeatureExtractor(nn.Module):
    """A ResNet up to layer3, with stride 1 in layer3: 300 x 300 gives 38 x 38."""

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
        """num_labels: C, the number of categories plus 1."""
        super().__init__()
        self.num_labels = num_labels
        self.feature_extractor = FeatureExtractor(backbone)
        channels = feature_channels(backbone)
        self.additional_blocks = nn.ModuleList(
            _make_extra_block(channels[k], HIDDEN_CHANNELS[k], channels[k + 1], halve=k < FIRST_PADDED_BLOCKS)
            for k in range(len(HIDDEN_CHANNELS))
        )
        self.loc = _make_heads(channels, 4)
        self.conf = _make_heads(channels, num_labels)
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
    """The memory format of weights and images in which training is fastest.

    Channels last, except for the smaller networks on a CPU that has AVX2 but not AVX512: oneDNN computes the gradients
    of their 3 x 3 convolutions a tenth faster with channels first.  Evaluation is always faster with channels last.
    """
    small = feature_channels(backbone)[0] < 1024
    on_avx2 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if small and on_avx2 else torch.channels_last


def _make_extra_block(inputs: int, hidden: int, outputs: int, *, halve: bool) -> nn.Sequential:
    stride, padding = (2, 1) if halve else (1, 0)
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, kernel_size=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, kernel_size=3, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _make_heads(channels: tuple[int, ...], values: int) -> nn.ModuleList:
    """One 3 x 3 convolution per feature map, with `values` outputs for each default box."""
    return nn.ModuleList(
        nn.Conv2d(inputs, boxes * values, kernel_size=3, padding=1)
        for inputs, boxes in zip(channels, BOXES_PER_CELL, strict=True)
    )


def _predict(heads: nn.ModuleList, features: list[Tensor], values: int) -> Tensor:
    """The heads' outputs as [N, values, cells x boxes], concatenated; [N, values, A]."""
    outputs = [head(feature) for head, feature in zip(heads, features, strict=True)]
    return torch.cat([output.reshape(output.shape[0], values, -1) for output in outputs], dim=2)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A channels-last copy for inference, its batch-norms folded into the convolutions before them.

    Returns the model itself if there is nothing to fold.  Requires that modules call their children in the order of
    definition, as torchvision's ResNets and SSD300 do.
    """
    if not any(_folding_pairs(module) for module in model.modules()):
        return model
    copy = deepcopy(model).eval()
    for module in list(copy.modules()):
        for convolution, norm in _folding_pairs(module):
            folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, folded)
            setattr(module, norm, nn.Identity())
    return copy.to(memory_format=torch.channels_last)


def _folding_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of each child convolution that a batch-norm follows, and of that batch-norm."""
    children = list(module.named_children())
    return [
        (name, following)
        for (name, child), (following, next_child) in pairwise(children)
        if isinstance(child, nn.Conv2d) and isinstance(next_child, nn.BatchNorm2d)
    ]
