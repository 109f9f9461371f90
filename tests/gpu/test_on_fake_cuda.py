"""The CUDA code on a GPU that is not there: its results are the CPU's, and the host waits for it where it has to.

Where a test fails, `events` says which operator waited or copied, with types and shapes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.benchmark import WARM_UP, benchmark
from src.data.annotations.coco import Annotations, Category, locations, read_annotations
from src.data.images.formats import Images
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader, TorchTrainLoader
from src.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from src.evaluation.predict import predict
from src.report.report import Report, RunContext
from src.runtime.distributed import Processes
from src.runtime.preemption import GracefulShutdown
from src.ssd.detect import detect
from src.training.step import Schedule, Trainer, make_optimizer, train_epoch
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.fake_cuda import CPU, GPU, Event, FakeGpu, GpuTensor, fake_gpu
from tests.helpers.rank_programs import small_network

IMAGES, BATCH, LABELS = 6, 2, 3
# What an iteration copies to the GPU, all from pinned memory: a HostBatch, whose images have a box each.
HOST_BATCH = ["uint8 [2, 3, 300, 300]", "float32 [2, 3, 4]", "float32 [2, 4]", "int64 [2]", "int64 [2]"]
NMS = "torchvision.nms"


@pytest.fixture
def gpu():
    with fake_gpu() as entered:
        yield entered


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    boxes = [annotation(image, (5 + image, 6, 130, 108), 1 + image % 2) for image in range(1, IMAGES + 1)]
    return write_coco(tmp_path_factory.mktemp("data"), boxes, images=IMAGES)


def annotations_of(data: Path, split: str = "train") -> Annotations:
    return read_annotations(*locations(data, split), for_scoring=True)


def make_trainer(device: torch.device, *, half: bool = False) -> Trainer:
    model = small_network().to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=5e-4)
    return Trainer(model, optimizer=optimizer, device=device, half=half, processes=Processes.single(device))


def detecting_network(device: torch.device) -> torch.nn.Module:
    """A network that finds a few of the largest boxes in every image, not the same in each."""
    model = small_network()
    with torch.no_grad():
        bias = model.head.bias.view(4 + LABELS, 8732)
        bias[4] += 6  # background
        bias[5:, -40:] += 6
    return model.to(device, memory_format=torch.channels_last)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, GpuTensor) else tensor


def train(device: torch.device, batches, *, half: bool = False) -> list[torch.Tensor]:
    """The weights after an epoch on these batches."""
    trainer = make_trainer(device, half=half)
    stop = GracefulShutdown(trainer.breakdown.processes)
    schedule = Schedule(base=0.01, images=BATCH, warmup=0, multistep=())
    try:
        train_epoch(
            trainer, batches, schedule, epoch=0, first_iteration=0, start=0, stop=stop, report=Report.disabled()
        )
    finally:
        stop.close()
    return [on_host(parameter.detach()) for parameter in trainer.model.parameters()]


class Iterations:
    """Batches, and where the events of each iteration begin: that of making its batch is the first."""

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

    def events(self, iteration: int) -> list[Event]:
        return self.gpu.events[self.first[iteration] : self.first[iteration + 1]]


def torch_loader(data: Path, device: torch.device, half: bool = False) -> TorchTrainLoader:
    return TorchTrainLoader(
        annotations_of(data), LoaderConfig(batch_size=BATCH, num_workers=0, device=device, amp=half)
    )


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_an_iteration_reads_nothing_and_copies_its_batch_alone(data, half):
    """Up to the next that is logged, with which an epoch begins.  The weights become the CPU's."""
    ours, start = train(CPU, torch_loader(data, CPU)), small_network().parameters()
    with fake_gpu() as gpu:
        iterations = Iterations(torch_loader(data, GPU, half), gpu)
        theirs = train(GPU, iterations, half=half)
    for number in range(1, IMAGES // BATCH):
        events = iterations.events(number)
        assert {event.kind for event in events} == {"copy in"}, events
        assert [event.what for event in events] == HOST_BATCH
    assert "mixed" not in gpu.kinds()
    ours, theirs, start = (torch.cat([part.detach().flatten() for part in parts]) for parts in (ours, theirs, start))
    assert (theirs - ours).norm() <= (0.05 if half else 1e-4) * (ours - start).norm() != 0


def test_a_batch_of_dali_copies_colours_alone(data):
    """The graph runs on the CPU; what a GPU's leaves on the GPU is put there."""
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
            assert [tuple(event) for event in iterations.events(number)] == [("copy in", "float32 [2, 3, 4]")]
        assert "mixed" not in gpu.kinds()
    for one, other in zip(ours, theirs, strict=True):
        for part, expected in zip(other, one, strict=True):
            assert part.device == GPU
            torch.testing.assert_close(on_host(part).to(expected.dtype), expected, atol=5e-3, rtol=0)
        assert other.images.dtype == torch.float16


def network_output(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets [N, 4, A] and logits [N, C, A] with some candidates an image."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(images, 4, 8732, generator=generator)
    logits = torch.randn(images, LABELS, 8732, generator=generator)
    logits[:, 0] += 5
    return offsets, logits


def waits(gpu: FakeGpu) -> list[str]:
    """The operators for which the host waited, but for non-maximum suppression, of which each image has one."""
    return [event.what.split()[0] for event in gpu.events if event.kind == "wait" and NMS not in event.what]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_detections_are_the_cpus_and_wait_no_more_for_more_images(dtype):
    found = []
    for images in (1, 5):
        offsets, logits = (part.to(dtype) for part in network_output(images))
        with fake_gpu() as gpu:
            ours = detect(GpuTensor(offsets), GpuTensor(logits))
            found.append(waits(gpu))
            assert "mixed" not in gpu.kinds()
        for one, other in zip(ours, detect(offsets, logits), strict=True):
            assert len(other.scores) > 0
            for part, expected in zip(one, other, strict=True):
                assert part.device == GPU
                assert torch.equal(on_host(part), expected)
    assert found[0] == found[1] != []


def evaluation(data: Path, device: torch.device, batch_size: int, network: torch.nn.Module | None = None) -> Evaluation:
    annotations = annotations_of(data, "val")
    loader = EvaluationLoader(annotations, LoaderConfig(batch_size=batch_size, num_workers=0, device=device))
    return evaluate(network or detecting_network(device), loader, annotations, processes=Processes.single(device))


def test_an_evaluation_has_the_cpus_figures_and_waits_for_batches_not_for_images(data):
    ours = evaluation(data, CPU, IMAGES)
    assert ours.scores.metrics["AP50"] > 0
    found = {}
    for batch_size in (IMAGES, IMAGES // 2):
        with fake_gpu() as gpu:
            network = detecting_network(GPU)
            start = len(waits(gpu))
            theirs = evaluation(data, GPU, batch_size, network)
            found[batch_size] = len(waits(gpu)) - start
        assert "mixed" not in gpu.kinds()
        images = [event.what for event in gpu.events if event.kind == "copy in" and "uint8" in event.what]
        assert images == [f"uint8 [{batch_size}, 3, 300, 300]"] * (IMAGES // batch_size)
        for one, other in zip(ours.results, theirs.results, strict=True):
            np.testing.assert_allclose(one, other, atol=0.02)
        assert theirs.scores.metrics == ours.scores.metrics
    assert 0 < found[IMAGES] < found[IMAGES // 2] <= 2 * found[IMAGES]


def test_predictions_are_the_cpus(data, tmp_path):
    categories = [Category(1, "square"), Category(2, "disc")]
    files = sorted((data / "val2017").iterdir())[:3]
    images = Images(data / "val2017", files, 0, [])
    config = EvaluationConfig(batch_size=2, num_workers=0, amp=False)
    listed = {}
    for device in (CPU, GPU):
        with fake_gpu() as gpu:
            context = RunContext(Processes.single(device), Report.disabled(), tmp_path / device.type)
            done = predict(detecting_network(device), images, categories, config, context)
        assert "mixed" not in gpu.kinds()
        assert done.detections > 0
        listed[device] = json.loads((tmp_path / device.type / "detections.json").read_text())
    assert listed[CPU] == listed[GPU]


def test_a_benchmark_waits_for_each_step_and_inside_it_for_no_more_than_a_run_does(gpu, data, monkeypatch):
    monkeypatch.setattr("src.benchmark.STEPS", 1)
    trainer, start = make_trainer(GPU), len(gpu.events)
    benchmark(
        trainer,
        torch_loader(data, GPU),
        annotations_of(data),
        backbone="small",
        batch_size=BATCH,
        report=Report.disabled(),
    )
    steps = [[]]
    for event in gpu.events[start:]:
        if event.what == "synchronize":
            steps.append([])
        else:
            steps[-1].append(event)
    bare, whole, detecting = (steps[kind : kind + WARM_UP + 1] for kind in range(0, 3 * (WARM_UP + 1), WARM_UP + 1))
    assert bare[1:] == [[]] * WARM_UP
    assert [[event.what for event in step] for step in whole[1:]] == [HOST_BATCH] * WARM_UP
    assert detecting[2:] == detecting[1:2] * (WARM_UP - 1)  # the first copies the default boxes in
    assert "mixed" not in gpu.kinds()
