"""Training on a fake GPU: the host does not wait inside an iteration, and the weights are the CPU's.

A failed test prints the events: the operators that waited or copied, with types and shapes.
"""

import pytest
import torch

from src.data.pipelines.batch import BatchMaker, HostBatch
from src.data.pipelines.loader_config import LoaderConfig
from src.report.report import Report
from src.runtime.preemption import GracefulShutdown
from src.training.checkpoint import Position
from src.training.loop import train_epoch
from src.training.schedule import Schedule
from tests.helpers.fake_cuda import CPU, GPU, FakeGpu, GpuTensor, fake_gpu
from tests.helpers.fake_cuda_runs import (
    BATCH,
    HOST_BATCH,
    IMAGES,
    annotations_of,
    assert_about,
    computed,
    dtypes,
    on_host,
    small_trainer,
    torch_loader,
    waits_and_copies,
)
from tests.helpers.rank_programs import small_network

COPIES = [f"pinned copy in {what}" for what in HOST_BATCH]
# Numbers of operators that compute on the GPU, as of today.
BATCH_OPERATORS, STEP_OPERATORS, HALF_STEP_OPERATORS = 82, 75, 112


def train(device: torch.device, batches, *, half: bool = False) -> list[torch.Tensor]:
    """The weights after an epoch on these batches."""
    trainer = small_trainer(device, half=half)
    stop = GracefulShutdown(trainer.processes)
    schedule = Schedule(base_learning_rate=0.01, global_batch_size=BATCH)
    try:
        train_epoch(trainer, batches, schedule, position=Position(), shutdown=stop, report=Report.disabled())
    finally:
        stop.close()
    return [on_host(parameter.detach()) for parameter in trainer.model.parameters()]


class Iterations:
    """Passes batches on and notes at which event each iteration starts; making its batch belongs to it."""

    def __init__(self, batches, gpu: FakeGpu) -> None:
        self.batches, self.gpu = batches, gpu
        self.first: list[int] = []

    def __iter__(self):
        batches = iter(self.batches)
        while True:
            self.first.append(len(self.gpu.events))
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def events(self, iteration: int) -> list[str]:
        """Of an iteration that is not the last."""
        return waits_and_copies(self.gpu, self.first[iteration])[: self.first[iteration + 1] - self.first[iteration]]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_an_iteration_waits_only_if_it_is_logged_and_copies_only_its_batch(data, half):
    """The first iteration is logged.  At the end the weights are about the CPU's."""
    ours, start = train(CPU, torch_loader(data, CPU)), small_network().parameters()
    with fake_gpu() as gpu:
        iterations = Iterations(torch_loader(data, GPU, half), gpu)
        theirs = train(GPU, iterations, half=half)
    read = "aten._local_scalar_dense"
    # Mean and deviation are copied once; the report reads whether losses are finite, losses, loss scale, skipped steps.
    logged = ["copy in float32 [2, 3]", read, "copy out float32 [2]", *([read] if half else []), read]
    assert iterations.events(0) == COPIES + logged
    for number in range(1, IMAGES // BATCH):
        assert iterations.events(number) == COPIES
    end = waits_and_copies(gpu, iterations.first[-1])
    assert end == [read] * 3  # whether losses and weights are finite, skipped steps
    assert "mixed" not in gpu.kinds()
    ours, theirs, start = (torch.cat([part.detach().flatten() for part in parts]) for parts in (ours, theirs, start))
    assert (theirs - ours).norm() <= (0.05 if half else 1e-4) * (ours - start).norm() != 0


def test_a_batch_of_dali_copies_only_colours(data):
    """The graph runs on the CPU; the test puts the outputs that a GPU's graph leaves on the GPU there."""
    pytest.importorskip("nvidia.dali")  # it has no wheels for this system
    from tests.helpers.dali_loaders import epoch, loader

    annotations = annotations_of(data)
    ours = epoch(loader(annotations), 0)
    theirs = loader(annotations)
    theirs.set_epoch(0)
    run = theirs._run

    def run_on_gpu() -> dict[str, torch.Tensor]:
        outputs = run()
        return outputs | {name: GpuTensor(outputs[name]) for name in ("images", "boxes", "labels")}

    theirs._run, theirs.device, theirs.dtype = run_on_gpu, GPU, torch.float16
    with fake_gpu() as gpu:
        iterations = Iterations(theirs, gpu)
        theirs = list(iterations)
        for number in range(1, len(theirs)):
            assert iterations.events(number) == ["pinned copy in float32 [2, 3, 4]"]
        assert "mixed" not in gpu.kinds()
    for one, other in zip(ours, theirs, strict=True):
        for part, expected in zip(other, one, strict=True):
            assert part.device == GPU
            torch.testing.assert_close(on_host(part).to(expected.dtype), expected, atol=5e-3, rtol=0)
        assert other.images.dtype == torch.float16


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_a_batch_and_a_step_take_as_many_operators_as_today(half):
    """64 boxes in 8 images: a batch that is made image by image, or a few boxes at a time, takes more operators."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(64, 2, generator=generator) / 2
    host = HostBatch(
        torch.randint(0, 256, (8, 3, 300, 300), dtype=torch.uint8, generator=generator),
        torch.eye(3, 4).repeat(8, 1, 1),
        torch.cat((low, low + 0.3), dim=1),
        torch.ones(64, dtype=torch.int64),
        torch.arange(8).repeat_interleave(8),
    )
    config = LoaderConfig(batch_size=8, num_workers=0, device=GPU, amp=half)
    with fake_gpu() as gpu:
        make_batch = BatchMaker(config.dtype).to(GPU)
        make_batch(host)  # copies mean and deviation
        trainer = small_trainer(GPU, half=half)
        first = len(gpu.operators)
        batch = make_batch(host)
        second = len(gpu.operators)
        trainer.step(batch, 1e-3)
    assert batch.images.dtype == config.dtype == (torch.float16 if half else torch.float32)
    assert "float64" not in dtypes(gpu.operators[first:])
    assert_about(second - first, BATCH_OPERATORS)
    assert_about(len(gpu.operators) - second, HALF_STEP_OPERATORS if half else STEP_OPERATORS)
    assert not computed(gpu, "aten.zero_", "aten._foreach_zero_", first=second)  # gradients are dropped instead
