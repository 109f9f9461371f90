"""Whether the network learns: `python -m benchmarks.learning --data DIR` prints the mAP on 16 images of DIR.

ResNet-18 from random weights, augmented as designed, batch 8, 320 iterations at a rate peaking at 0.02, scored on the
same 16 images.  The published implementation reached 0.54 on the first 16 annotated images of coco128.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from main import main as train

IMAGES, BATCH, ITERATIONS, PEAK = 16, 8, 320, 0.02
GOAL = 0.5
REFERENCE_BATCH = 32  # --learning-rate is stated for it


def take_images(source: Path, folder: Path) -> None:
    """Writes the first annotated images of `source` as a data set that trains and validates on the same ones."""
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    annotated = {entry["image_id"] for entry in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in annotated][:IMAGES]
    chosen = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in chosen]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (folder / f"{split}2017").symlink_to((source / "train2017").resolve())


def flags(data: Path, output: Path, pipeline: str) -> list[str]:
    """The command's flags."""
    epochs = ITERATIONS * BATCH // IMAGES
    return [
        *("--data", str(data), "--output", str(output), "--data_pipeline", pipeline),
        *("--backbone", "resnet18", "--backbone-weights", "none", "--fp16", "--num-workers", "2"),
        *("--epochs", str(epochs), "--batch-size", str(BATCH), "--eval-batch-size", "16"),
        *("--learning-rate", str(PEAK * REFERENCE_BATCH / BATCH), "--warmup", "40"),
        *("--multistep", str(epochs * 3 // 4), str(epochs * 15 // 16), "--evaluation", str(epochs - 1)),
    ]


def run(data: Path, pipeline: str = "no_dali") -> float:
    """Trains and scores; the mAP on the images trained on."""
    with tempfile.TemporaryDirectory() as folder:
        take_images(data, Path(folder, "data"))
        output = Path(folder, "output")
        status = train(flags(Path(folder, "data"), output, pipeline))
        if status:
            raise SystemExit(status)
        lines = (output / "metrics.jsonl").read_text().splitlines()
    return next(entry["mAP"] for entry in map(json.loads, reversed(lines)) if entry["kind"] == "evaluation")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder in the COCO 2017 layout, such as coco128")
    parser.add_argument("--data_pipeline", choices=("dali", "no_dali"), default="no_dali")
    args = parser.parse_args(argv)
    accuracy = run(args.data, args.data_pipeline)
    print(f"mAP on the {IMAGES} images trained on: {accuracy:.4f} (goal {GOAL})")
    return int(accuracy < GOAL)


if __name__ == "__main__":
    sys.exit(main())
