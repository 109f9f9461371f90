"""What tests of both pipelines and of the whole program share."""

from pathlib import Path

import torch

import main
from src.data.annotations.coco import Annotations, read_annotations
from src.data.pipelines.loaders import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader
from tests.integration.test_main import flags

CPU = torch.device("cpu")


def train_loader(pipeline: str, annotations: Annotations, **options):
    """A training loader on the CPU, an image a batch and without augmentation where not asked for otherwise."""
    augment = options.pop("augment", False)
    workers = 0 if pipeline == "no_dali" else 2
    config = LoaderConfig(**{"batch_size": 1, "num_workers": workers, "device": CPU, **options})
    if pipeline == "no_dali":
        return TorchTrainLoader(annotations, config, augment=augment)
    from src.data.pipelines.dali_pipeline import DaliTrainLoader

    return DaliTrainLoader(annotations, config, augment=augment)


def read(folder: Path) -> Annotations:
    return read_annotations(folder / "annotations" / "instances_train2017.json", folder / "train2017")


def run(pipeline: str, data: Path, output: Path, *more: str) -> int:
    """One small run of the program; its exit status."""
    return main.main(flags(data, output, "--data_pipeline", pipeline, *more))


def error_line(capsys) -> str:
    """The one line on standard error, without DALI's own, which it colours."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "\x1b[" not in line)
    assert line.startswith("main.py: error: ")
    return line
