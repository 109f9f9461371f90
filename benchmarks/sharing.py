"""Scoring by two processes beside one; `-m benchmarks.sharing FOLDER`, by a launcher, is one of the processes.

FOLDER holds the ground truth and the detections of a `benchmarks.evaluation.Scene`, see `rows`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from src import distributed
from src.data.coco import Annotations, read_annotations
from src.evaluation.evaluate import score_together
from src.evaluation.scoring import Results, score
from src.evaluation.stopwatch import Stopwatch

from . import table

HERE = Path(__file__).parents[1]
PROCESSES = 2
GOAL = 0.6  # of the time that one process takes; both have all cores, of which faster-coco-eval uses several itself
LONGEST_WAIT = 1.0  # seconds, of the process that does not put things together
DETECTIONS, OUTCOME = "detections.npz", "outcome.json"


def rows(annotations: Annotations, results: Results, folder: Path) -> list[dict]:
    """Times of both, and how long the other process waits; annotations.path must be in `folder`."""
    np.savez(folder / DETECTIONS, **results._asdict())
    began = time.perf_counter()
    expected = score(annotations, results)
    alone = time.perf_counter() - began
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}")
    line = [sys.executable, *launcher, "-m", "benchmarks.sharing", str(folder), annotations.path.name]
    subprocess.run(line, check=True, cwd=HERE)
    outcome = json.loads((folder / OUTCOME).read_text())
    assert outcome["figures"] == expected.figures
    return [
        table.cost(f"scoring on {PROCESSES} processes, beside one (s)", outcome["scoring"], alone, GOAL),
        table.cost(
            f"scoring on {PROCESSES} processes: waiting of the other, beside the longest allowed (s)",
            outcome["waiting"], LONGEST_WAIT, 1,
        ),
    ]  # fmt: skip


def main(folder: Path, annotation_file: str) -> None:
    """One of the processes; each has found the detections of every other image."""
    with distributed.start(int(os.environ["LOCAL_RANK"]), torch.device("cpu")) as processes:
        annotations = read_annotations(folder / annotation_file, folder)
        with np.load(folder / DETECTIONS) as columns:
            results = Results(**columns)
        own = annotations.image_ids[processes.rank :: processes.world_size]
        results = Results(*(column[np.isin(results.image_ids, own)] for column in results))
        processes.maximum(0)  # all begin together
        found = score_together(processes, annotations, results, 0, watch=Stopwatch())
        if processes.is_main:
            seconds = found.seconds["gathering"] + found.seconds["scoring"]
            outcome = {"figures": found.scores.figures, "scoring": seconds, "waiting": found.seconds["waiting"]}
            (folder / OUTCOME).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
