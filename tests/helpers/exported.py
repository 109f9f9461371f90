"""A data set, a checkpoint and its exported files, with the tiny model."""

from pathlib import Path

import torch

import main
from src.ssd.model import SSD300
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.tiny_model import use_tiny_model

CATEGORIES = [[3, "square"], [90, "disc"]]


def random_network(backbone: str, categories: int, seed: int = 0) -> SSD300:
    """A network with random weights that detects much, with all scores, in any picture."""
    torch.manual_seed(seed)
    model = SSD300(backbone, categories + 1).eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 300, 300))
        for heads, output, spread in ((model.loc, outputs[0], 0.3), (model.conf, outputs[1], 3)):
            for head in heads:
                head.weight.mul_(spread / output.std())
    return model


class Exported:
    """A data set, a checkpoint of the tiny model, and the folder of its exported files."""

    def __init__(self, folder: Path) -> None:
        entries = [annotation(image, (30, 20, 90, 80), CATEGORIES[image % 2][0]) for image in (1, 2, 3, 4)]
        names = [{"id": number, "name": name} for number, name in CATEGORIES]
        self.data = write_coco(folder / "data", entries, categories=names)
        self.checkpoint, self.exported = folder / "model.pt", folder / "exported"
        with use_tiny_model():
            self.model = random_network("resnet18", 2)
        state = {"model": self.model.state_dict(), "categories": CATEGORIES, "backbone": "resnet18"}
        torch.save(state, self.checkpoint)

    def run(self, mode: str, checkpoint: Path, output: Path, data: Path | None = None, *more: str) -> int:
        flags = ["--data", str(data or self.data), "--mode", mode, "--checkpoint", str(checkpoint), *more]
        with use_tiny_model():
            return main.main([*flags, "--output", str(output), "--num-workers", "0", "--ebs", "3"])
