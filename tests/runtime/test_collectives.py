"""The collectives of 1,024 processes: a fixed list for an epoch, an evaluation and a stop, whatever the data set.

A run of main.py is rank 0 of torch's fake group, which sends nothing: each collective gives rank 0 its own value for
every rank.  Rank 0's list is that of every rank, since runs of real processes would hang otherwise.
"""

import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import main
from src.evaluation import evaluate
from src.evaluation.background_files import BackgroundFiles
from src.runtime import distributed, process_group
from src.runtime.distributed import Processes
from src.runtime.launcher_env import RankInfo
from src.ssd.model import SSD300
from src.training.step import Trainer
from tests.helpers.datasets import annotation, write_annotations, write_image

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
pytestmark = pytest.mark.skipif(
    fake_pg.FakeStore.__module__ == fake_pg.__name__,
    reason="an older fake group leaves the outputs of its collectives unwritten",
)

PROCESSES, BATCH = 1024, 2
FLAGS = ("--backbone", "resnet18", "--backbone-weights", "none", "-b", BATCH, "--num-workers", 0, "--epochs", 1,
         "--data_pipeline", "no_dali", "--evaluation", 0)  # fmt: skip
CATEGORIES = [{"id": 1, "name": "square"}]  # only one, so rank 0 scores all of them

# The groups: "all" for gradients and weights, "host" for integers and objects, "patient" is the long_timeout_group.
GRADIENTS = "allreduce all"  # one message a step, of a network as small as this one
ORDER = ["broadcast all"] * 2  # DDP's, once a process: in which order the gradients are done
INTEGER = "allreduce host"
CHECKED = [INTEGER] * 2  # are the last losses finite, and the weights and batch-norm statistics?
OBJECT = ["broadcast host"] * 2  # its size, then itself
GATHERED = ["allgather host", "gather host"]
UNEQUAL = ["allgather patient", "gather patient"]
SCATTERED = ["broadcast host", "scatter host", "scatter host"]


class Recorder(TorchDispatchMode):
    """Records the name and group of every collective, also of those that C++ code starts."""

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.groups = groups
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            group = next(value for value in args if isinstance(value, torch.ScriptObject))
            name = self.groups[dist.ProcessGroup.unbox(group).group_name]
            self.seen.append(f"{function.__name__.split('_.')[0]} {name}")
        return function(*args, **(kwargs or {}))


class FullStore(dist.HashStore):
    """A store that counts all other ranks as present."""

    def add(self, key: str, amount: int) -> int:
        return super().add(key, amount) + (PROCESSES - 1) * key.endswith(": there")


class Parallel(DistributedDataParallel):
    """DDP with a hook that averages gradients, because the fake group's all-reduce lacks the result that DDP reads."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, averaged)


def averaged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    dist.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.fixture
def recorder(monkeypatch, tiny_model) -> Iterator[Recorder]:
    """Makes main.py rank 0 of PROCESSES."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=PROCESSES)
    monkeypatch.setattr(distributed, "_gloo_group", lambda timeout: dist.new_group(backend="fake", timeout=timeout))
    monkeypatch.setattr(distributed, "DistributedDataParallel", Parallel)
    processes = Processes(0, PROCESSES, torch.device("cpu"), FullStore())
    monkeypatch.setattr(process_group, "rank_info_from_env", lambda local_rank=0: RankInfo(0, PROCESSES, 0))
    monkeypatch.setattr(process_group, "_join", lambda device, info: processes)
    # The fake gather returns rank 0's value PROCESSES times: use one.
    join, together = evaluate.join_results, evaluate.merge_shards
    monkeypatch.setattr(evaluate, "join_results", lambda parts, annotations: join(islice(parts, 1), annotations))
    monkeypatch.setattr(evaluate, "merge_shards", lambda annotations, parts: together(annotations, parts[:1]))
    monkeypatch.setattr(BackgroundFiles, "start", lambda *_: None)  # another process draws the pictures
    groups = {"all": dist.group.WORLD, "host": processes.host_group, "patient": processes.long_timeout_group}
    yield Recorder({group.group_name: name for name, group in groups.items()})
    if dist.is_initialized():
        dist.destroy_process_group()


def write_data(folder: Path, images: int) -> Path:
    """A data set of `images` links to one picture, each with one box."""
    picture = folder / "picture.jpg"
    write_image(picture, 160, 120)
    entries = [{"id": i, "file_name": f"{i}.jpg", "width": 160, "height": 120} for i in range(images)]
    boxes = [{"id": 1 + i, **annotation(i)} for i in range(images)]
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        for entry in entries:
            (folder / f"{split}2017" / entry["file_name"]).hardlink_to(picture)
        write_annotations(folder, {"images": entries, "annotations": boxes, "categories": CATEGORIES}, split)
    return folder


def run(recorder: Recorder, folder: Path, images: int) -> tuple[int, list[str]]:
    """The exit status, and the collectives from the first training step on."""
    flags = ["--data", write_data(folder, images), "--output", folder / "run", *FLAGS]
    with recorder:
        status = main.main(list(map(str, flags)))
    return status, recorder.seen[recorder.seen.index(GRADIENTS) :]


def steps(count: int) -> list[str]:
    """The collectives of a run's first training steps: gradients, the poll for SIGTERM, the loss after the first."""
    first, second = [GRADIENTS, INTEGER, INTEGER], [*ORDER, GRADIENTS, INTEGER]
    return [*first, *second, *[GRADIENTS, INTEGER] * (count - 2)]


def saved() -> list[str]:
    buffers = len(list(SSD300("resnet18", 2).buffers()))
    return ["broadcast all"] * buffers + GATHERED + OBJECT


def evaluated() -> list[str]:
    buffers = len(list(SSD300("resnet18", 2).buffers()))
    return ["broadcast all"] * buffers + UNEQUAL + SCATTERED + UNEQUAL + OBJECT


@pytest.mark.parametrize(("images", "iterations"), [(2100, 2), (4000, 2), (6200, 4)])
def test_an_epoch_and_its_evaluation(recorder, tmp_path, images, iterations):
    """The run saves before the evaluation and twice after it (best and last); each time ranks then agree on SIGTERM."""
    status, seen = run(recorder, tmp_path, images)
    assert status == main.DONE
    epoch = [*steps(iterations), *CHECKED, *saved(), INTEGER]
    assert seen == [*epoch, *evaluated(), *saved(), *saved(), INTEGER]


def test_a_stop(recorder, tmp_path, monkeypatch):
    """SIGTERM comes in the second of four steps; all ranks stop a step later."""
    step, count = Trainer.step, iter(range(4))

    def signalled(*arguments):
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(Trainer, "step", signalled)
    status, seen = run(recorder, tmp_path, 6200)
    assert status == main.TERMINATED
    assert seen == [*steps(3), *CHECKED, *saved()]
