"""Training, loaders and evaluation in real processes on gloo; rank_programs.py is what they run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.runtime.distributed import Processes
from tests.helpers import rank_programs
from tests.helpers.datasets import read
from tests.helpers.launch import TORCHRUN, command
from tests.helpers.preloaded_python import launch

ALONE = Processes.single(torch.device("cpu"))
# torch.distributed.launch passes --local-rank=K, torchrun does not.
LAUNCHERS = {2: ("-m", "torch.distributed.launch"), 3: TORCHRUN}


@pytest.fixture(scope="module", params=LAUNCHERS, ids="{} processes".format)
def launched(request, tmp_path_factory, oracle) -> tuple[Path, list[dict]]:
    """The folder of the processes' files, and the report of each rank."""
    folder = tmp_path_factory.mktemp("processes")
    rank_programs.write_data(folder)
    np.save(folder / "default_boxes.npy", oracle("default_boxes.npz")["xywh"])
    script = ("-m", "tests.helpers.rank_programs", "--data", folder)
    done = launch(command(script, processes=request.param, launcher=LAUNCHERS[request.param]))
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(request.param)]


def test_every_process_knows_its_rank(launched):
    _, reports = launched
    assert [report["world_size"] for report in reports] == [len(reports)] * len(reports)
    passed = LAUNCHERS[len(reports)] is not TORCHRUN
    assert [report["local_rank"] for report in reports] == [rank * passed for rank in range(len(reports))]


def test_two_processes_take_the_steps_of_one_on_the_whole_batch(launched, oracle):
    folder, reports = launched
    if len(reports) != 2:
        assert "weights" not in reports[0]  # 8 images are not shared among 3
        return
    assert reports[0]["weights"] == reports[1]["weights"]
    start = rank_programs.small_network().state_dict()
    expected = rank_programs.steps_by_hand(oracle("default_boxes.npz")["xywh"])
    for name, weights in torch.load(folder / "weights.pt").items():
        moved = (expected[name] - start[name]).double()
        assert (weights - expected[name]).double().norm() <= 1e-4 * moved.norm(), name
        assert moved.any() or "running" in name or "tracked" in name, name


@pytest.mark.parametrize("pipeline", ["dali", "no_dali"])
@pytest.mark.parametrize("count", rank_programs.SIZES)
def test_processes_do_equally_many_iterations_and_see_every_image(launched, pipeline, count):
    _, reports = launched
    epochs = [
        [report["images"][f"{pipeline} {count}"][epoch] for report in reports] for epoch in range(rank_programs.EPOCHS)
    ]
    images_per_rank = -(-count // len(reports))
    padded = -(-images_per_rank // rank_programs.BATCH) * rank_programs.BATCH
    for ranks in epochs:
        assert [len(images) for images in ranks] == [padded] * len(reports)
        assert set().union(*ranks) == set(range(count))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("pipeline", ["dali", "no_dali"])
def test_processes_and_epochs_augment_an_image_differently(launched, pipeline):
    _, reports = launched
    digests = [digest for report in reports for digest in report["augmented"][pipeline]]
    assert len(digests) == len(reports) * rank_programs.EPOCHS * rank_programs.BATCH
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("count", [2, 8])
def test_evaluation_gives_the_same_metrics_on_any_number_of_processes(launched, count):
    """2 images are fewer than 3 processes; 8 is a data set of 9 images, one without boxes."""
    folder, reports = launched
    annotations = read(folder / str(count), "val", for_scoring=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = rank_programs.evaluation(annotations, ALONE)
    torch.set_num_threads(threads)
    assert [report["metrics"][str(count)] for report in reports] == [alone.coco_metrics.summary] * len(reports)
    assert alone.coco_metrics.summary["AP50"] > 0
    with np.load(folder / f"results-{count}.npz") as results:
        assert results["image_ids"].dtype == np.int64
        assert sorted(set(results["image_ids"])) == [rank_programs.FIRST_ID + i for i in range(len(annotations))]
        for name, array in alone.results._asdict().items():
            assert np.array_equal(results[name], array), name
