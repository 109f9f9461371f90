"""Small data sets and DALI loaders of them."""

from pathlib import Path

import numpy as np
import torch

from src.data.annotations.coco import Annotations
from src.data.pipelines.dali_pipeline import DaliTrainLoader
from src.data.pipelines.loaders import LoaderConfig
from tests.helpers.datasets import annotation, read, write_coco

CPU = torch.device("cpu")


def random_annotations(folder: Path, images: int = 7, *, seed: int = 0) -> Annotations:
    """Images with one to three random boxes each."""
    rng = np.random.default_rng(seed)
    annotations = [
        annotation(image, (*rng.uniform(0, 50, 2).tolist(), *rng.uniform(20, 60, 2).tolist()), int(rng.integers(1, 3)))
        for image in range(1, images + 1)
        for _ in range(int(rng.integers(1, 4)))
    ]
    return read(write_coco(folder, annotations, images=images, splits=("train",)))


def loader(annotations: Annotations, *, augment: bool = True, **options) -> DaliTrainLoader:
    config = LoaderConfig(**{"batch_size": 2, "device": CPU, "num_workers": 2, **options})
    return DaliTrainLoader(annotations, config, augment=augment)


def epoch(train_loader: DaliTrainLoader, number: int) -> list:
    train_loader.set_epoch(number)
    return list(train_loader)


def orders(train_loader: DaliTrainLoader, epochs: int) -> list[list[list[int]]]:
    """The image ids of every batch of some epochs, as a graph that decodes nothing gives them."""
    pipeline = train_loader.build(("ids",))
    return [[pipeline.run()[0].as_array()[:, 0].tolist() for _ in range(len(train_loader))] for _ in range(epochs)]
