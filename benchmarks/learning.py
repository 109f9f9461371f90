"""Whether the network learns: `python -m benchmarks.learning --data DIR` prints the mAP on 16 images of DIR.

ResNet-18 from random weights trains augmented images, batch 8, for 320 iterations with a learning rate that peaks at
0.02, in half precision if the device is fast at it.  The score is on the same 16 images.  The published implementation
reached 0.54 on those of coco128.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.step import HALF, PLAIN_CPU, make_trainer
from benchmarks.turns import CPU
from src.data.annotations.coco import Annotations, locations, read_annotations
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.loaders import PIPELINES, EvaluationLoader, make_train_loader
from src.evaluation.evaluate import evaluate
from src.report.report import Report
from src.runtime.devices import configure_backends
from src.runtime.distributed import Processes
from src.runtime.precision import half_is_fast
from src.runtime.preemption import GracefulShutdown
from src.training.checkpoint import Position
from src.training.loop import train_epoch
from src.training.schedule import REFERENCE_BATCH, Schedule

IMAGES, BATCH, ITERATIONS, PEAK = 16, 8, 320, 0.02
WARM_UP = 100  # iterations
DECAYS = (0.9, 0.97)  # shares of the epochs after which the learning rate falls to a tenth
GOAL = 0.5


def take_images(source: Path, folder: Path) -> Path:
    """Writes the annotations of the first annotated images of `source`; the file."""
    content = json.loads(locations(source, "train")[0].read_text())
    annotated = {entry["image_id"] for entry in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in annotated][:IMAGES]
    chosen = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in chosen]
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file


def run(data: Path, *, pipeline: str = "no_dali", seed: int = 0, device: torch.device = CPU) -> float:
    """Trains and scores; the mAP on the images trained on."""
    with tempfile.TemporaryDirectory() as folder:
        annotations = read_annotations(take_images(data, Path(folder)), locations(data, "train")[1], for_scoring=True)
        return train_and_score(annotations, pipeline=pipeline, seed=seed, device=device)


def train_and_score(annotations: Annotations, *, pipeline: str, seed: int, device: torch.device = CPU) -> float:
    """The mAP on the images of the annotations after training on them."""
    labels = len(annotations.categories) + 1
    torch.manual_seed(seed)
    trainer = make_trainer("resnet18", device, HALF if half_is_fast(device) else PLAIN_CPU, labels=labels)
    epochs = ITERATIONS * BATCH // IMAGES
    schedule = Schedule(
        base_learning_rate=PEAK * REFERENCE_BATCH / BATCH,
        global_batch_size=BATCH,
        warmup=WARM_UP,
        multistep=tuple(round(share * epochs) for share in DECAYS),
    )
    processes = Processes.single(device)
    config = LoaderConfig(batch_size=BATCH, num_workers=2, device=device, amp=trainer.amp, seed=seed)
    loader = make_train_loader(pipeline, annotations, config)
    with (
        closing(loader),
        closing(GracefulShutdown(processes)) as shutdown,
        closing(Report(None, append=True)) as report,
    ):
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            position = Position(epoch, iteration=epoch * len(loader))
            train_epoch(trainer, loader, schedule, position=position, shutdown=shutdown, report=report)
    images = EvaluationLoader(annotations, LoaderConfig(batch_size=IMAGES, num_workers=0, device=device))
    found = evaluate(trainer.model, images, annotations, processes=processes, amp=trainer.amp)
    print(", ".join(f"{name} {value:.4f}" for name, value in found.coco_metrics.summary.items() if value is not None))
    mean_precision = found.coco_metrics.summary["mAP"]
    assert mean_precision is not None  # the images have boxes
    return mean_precision


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in the COCO 2017 layout, such as coco128")
    parser.add_argument("--data_pipeline", choices=PIPELINES, default="no_dali")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="train on the GPU, in float16")
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0) if args.gpu else CPU
    configure_backends(device)
    accuracy = run(args.data, pipeline=args.data_pipeline, seed=args.seed, device=device)
    print(f"mAP on the {IMAGES} images trained on: {accuracy:.4f} (goal {GOAL})")
    return int(accuracy < GOAL)


if __name__ == "__main__":
    sys.exit(main())
