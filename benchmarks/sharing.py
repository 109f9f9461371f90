"""Scoring by two processes beside one; `-m benchmarks.sharing FOLDER FILE`, by a launcher, is one of the processes.

FOLDER holds the ground truth, FILE, and the detections of a `benchmarks.evaluation.Scene`, see `rows`.  Each process
has a core, or all have all cores, of which one process uses several already, in faster-coco-eval.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from benchmarks import table
from src.data.annotations.coco import Annotations, read_annotations
from src.evaluation.evaluate import RankResults, score_distributed
from src.evaluation.results import Results
from src.evaluation.scoring import score
from src.runtime import process_group

HERE = Path(__file__).parents[1]
PROCESSES = 2
GOAL = 0.6  # of the time that one process takes, with a core each
LONGEST_WAIT = 1.0  # seconds, of the process that does not put things together
A_CORE_EACH = "--a-core-each"
DETECTIONS, OUTCOME = "detections.npz", "outcome.json"


def rows(annotations: Annotations, results: Results, folder: Path) -> list[dict]:
    """Times of both, and how long the other process waits; annotations.path must be in `folder`."""
    np.savez(folder / DETECTIONS, **results._asdict())
    found = []
    if can_pin():
        alone, together = _alone_and_together(annotations, results, folder, a_core_each=True)
        name = f"scoring on {PROCESSES} processes with a core each, beside one with a core (s)"
        found.append(table.cost(name, together["scoring"], alone, GOAL))
    alone, together = _alone_and_together(annotations, results, folder, a_core_each=False)
    name = f"scoring on {PROCESSES} processes, beside one with as many cores as both (s)"
    found.append(table.cost(name, together["scoring"], alone))
    name = f"scoring on {PROCESSES} processes: waiting of the other, beside the longest allowed (s)"
    return [*found, table.cost(name, together["waiting"], LONGEST_WAIT, 1)]


def can_pin() -> bool:
    """Whether there is a core for each process, and a way to keep it to that."""
    return hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) >= PROCESSES


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Inside, this process computes on one of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _alone_and_together(
    annotations: Annotations, results: Results, folder: Path, *, a_core_each: bool
) -> tuple[float, dict]:
    """Seconds of one process, and the OUTCOME of all of them."""
    with on_core(0) if a_core_each else nullcontext():
        began = time.perf_counter()
        expected = score(annotations, results)
        alone = time.perf_counter() - began
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}")
    line = [sys.executable, *launcher, "-m", "benchmarks.sharing", str(folder), annotations.path.name]
    subprocess.run([*line, A_CORE_EACH] if a_core_each else line, check=True, cwd=HERE)
    together = json.loads((folder / OUTCOME).read_text())
    assert together["figures"] == expected.metrics
    return alone, together


def main(folder: Path, annotation_file: str, *, a_core_each: bool) -> None:
    """One of the processes; each has found the detections of every other image."""
    with on_core(int(os.environ["LOCAL_RANK"])) if a_core_each else nullcontext():
        _score(folder, annotation_file)


def _score(folder: Path, annotation_file: str) -> None:
    with process_group.start(int(os.environ["LOCAL_RANK"]), torch.device("cpu")) as processes:
        annotations = read_annotations(folder / annotation_file, folder, for_scoring=True)
        with np.load(folder / DETECTIONS) as columns:
            results = Results(**columns)
        own = annotations.image_ids[processes.rank :: processes.world_size]
        results = Results(*(column[np.isin(results.image_ids, own)] for column in results))
        processes.all_reduce_max(0)  # all begin together
        found = score_distributed(processes, annotations, RankResults(results, 0, None), {})
        if processes.is_main:
            seconds = found.seconds["gathering"] + found.seconds["scoring"]
            outcome = {"figures": found.scores.metrics, "scoring": seconds, "waiting": found.seconds["waiting"]}
            (folder / OUTCOME).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], a_core_each=A_CORE_EACH in sys.argv[3:])
