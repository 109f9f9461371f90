"""Training loaders of both pipelines."""

import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.loaders import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader

CPU = torch.device("cpu")


def train_loader(pipeline: str, annotations: Annotations, **options):
    """A training loader on the CPU, by default with one image a batch and without augmentation."""
    augment = options.pop("augment", False)
    workers = 0 if pipeline == "no_dali" else 2
    config = LoaderConfig(**{"batch_size": 1, "num_workers": workers, "device": CPU, **options})
    if pipeline == "no_dali":
        return TorchTrainLoader(annotations, config, augment=augment)
    from src.data.pipelines.dali_pipeline import DaliTrainLoader

    return DaliTrainLoader(annotations, config, augment=augment)
