"""A `src.evaluation.write_artifacts` that starts detections.json and never finishes it."""

import sys
import time
from pathlib import Path
from unittest import mock

from src.evaluation import write_artifacts
from src.runtime.output_files import atomic_write


def write_half(_: object, output: Path) -> None:
    with atomic_write(output / "detections.json") as file:
        file.write(b"half")
        file.flush()
        while True:
            time.sleep(0.01)


if __name__ == "__main__":
    with mock.patch.object(write_artifacts, "write_artifacts", write_half):
        write_artifacts.main(Path(sys.argv[1]))
