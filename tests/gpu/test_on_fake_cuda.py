"""The CUDA code on a GPU that is not there: its results are the CPU's, and the host waits for it where it has to.

Where a test fails, `events` says which operator waited or copied, with types and shapes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from src.benchmark import WARM_UP, benchmark
from src.data.annotations.coco import Annotations, Category, locations, read_annotations
from src.data.images.formats import ImageFiles
from src.data.pipelines.batch import BatchMaker, HostBatch
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import EvaluationLoader, TorchTrainLoader
from src.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from src.evaluation.predict import predict
from src.report.report import Report, RunContext
from src.runtime.distributed import Processes
from src.runtime.preemption import GracefulShutdown
from src.ssd.detect import detect
from src.training.checkpoint import Position
from src.training.loop import train_epoch
from src.training.schedule import Schedule
from src.training.step import Trainer
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.fake_cuda import CPU, GPU, Event, FakeGpu, GpuTensor, Operator, fake_gpu
from tests.helpers.rank_programs import small_network
from tests.helpers.tiny_model import narrow_network
from tests.helpers.trainers import make_trainer

IMAGES, BATCH, LABELS = 6, 2, 3
# What an iteration copies to the GPU, all from pinned memory: a HostBatch, whose images have a box each.
HOST_BATCH = ["uint8 [2, 3, 300, 300]", "float32 [2, 3, 4]", "float32 [2, 4]", "int64 [2]", "int64 [2]"]
# Operators that computed on the GPU, as of today.  Ten of a hundred more are a change of the method.
BATCH_OPERATORS, STEP_OPERATORS, HALF_STEP_OPERATORS, DETECTION_OPERATORS = 82, 75, 112, 148


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


def small_trainer(device: torch.device, *, half: bool = False) -> Trainer:
    return make_trainer(small_network().to(device, memory_format=torch.channels_last), device=device, half=half)


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
    trainer = small_trainer(device, half=half)
    stop = GracefulShutdown(trainer.processes)
    schedule = Schedule(base_learning_rate=0.01, global_batch_size=BATCH)
    try:
        train_epoch(trainer, batches, schedule, position=Position(), shutdown=stop, report=Report.disabled())
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


def waits(gpu: FakeGpu, first: int = 0) -> list[str]:
    """Where the host waited for the GPU or copied to it, in order: operators, and copies with what they copy."""
    found = []
    for kind, what in gpu.events[first:]:
        copied = what if what.startswith("copy") else f"copy in {what}"
        found.append(copied if "copy" in kind + what else what.split()[0])
    return found


def detection_waits(images: int) -> list[str]:
    """Of the detections of a batch: where its candidates are, how many, whether suppression has settled, what is kept.

    Without the default boxes, which are copied once.
    """
    return ["aten.nonzero", f"copy out int64 [{images}]", "aten.equal", f"copy out int64 [{images}]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_detections_are_the_cpus_and_wait_as_often_for_five_images_as_for_one(dtype):
    for images in (1, 5):
        offsets, logits = (part.to(dtype) for part in network_output(images))
        with fake_gpu() as gpu:
            detect(GpuTensor(offsets), GpuTensor(logits))  # copies the default boxes
            first = len(gpu.events)
            first_operator = len(gpu.operators)
            ours = detect(GpuTensor(offsets), GpuTensor(logits))
            # Some candidates are left after the first 512: is every image done?
            nonzero, counts, settled, kept = detection_waits(images)
            assert waits(gpu, first) == [nonzero, counts, settled, "aten._local_scalar_dense", kept]
            assert_about(len(gpu.operators) - first_operator, DETECTION_OPERATORS)
            assert "mixed" not in gpu.kinds()
        for one, other in zip(ours, detect(offsets, logits), strict=True):
            assert len(other.scores) > 0
            for part, expected in zip(one, other, strict=True):
                assert part.device == GPU
                assert torch.equal(on_host(part), expected)


def assert_about(count: int, today: int) -> None:
    assert 0.9 * today <= count <= 1.1 * today, count


def computed(gpu: FakeGpu, *names: str, first: int = 0) -> list[Operator]:
    return [operator for operator in gpu.operators[first:] if operator.name in names]


def evaluation(data: Path, network: torch.nn.Module, batch_size: int, *, half: bool = False) -> Evaluation:
    annotations = annotations_of(data, "val")
    device = next(network.parameters()).device
    loader = EvaluationLoader(annotations, LoaderConfig(batch_size=batch_size, num_workers=0, device=device))
    return evaluate(network, loader, annotations, processes=Processes.single(device), amp=half)


def evaluation_waits(counts: list[int], images: int) -> list[str]:
    """Of an evaluation in batches of `images`, with as many detections as `counts` has for each batch."""
    found = ["copy in float32 [8732, 4]"] * 3  # of the validation loss: to match and to encode
    for number, count in enumerate(counts):
        found.append(f"copy in uint8 [{images}, 3, 300, 300]")
        found += ["copy in float32 [2, 3]"] if number == 0 else []  # mean and deviation
        nonzero, candidates, settled, kept = detection_waits(images)
        found.append("aten._local_scalar_dense")  # how many outputs are not finite
        found += [f"copy in {part}" for part in (f"float32 [{images}, 4]", *[f"int64 [{images}]"] * 2)]  # the truth
        found += [nonzero, candidates]
        found += ["copy in float32 [8732, 4]"] if number == 0 else []  # default boxes
        found += [settled, kept]
        found += [f"copy out float32 [{count}, 4]", f"copy out int64 [{count}]", f"copy out float32 [{count}]"]
    return [*found, "copy out float64 [2]"]  # the validation loss


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
@pytest.mark.parametrize("batch_size", [IMAGES, IMAGES // 2, 1])
def test_an_evaluation_has_the_cpus_figures_and_waits_for_batches_not_for_images(data, batch_size, half):
    ours = evaluation(data, detecting_network(CPU), IMAGES)
    assert ours.scores.metrics["AP50"] > 0
    with fake_gpu() as gpu:
        network = detecting_network(GPU)
        start, first_operator = len(gpu.events), len(gpu.operators)
        theirs = evaluation(data, network, batch_size, half=half)
        found = waits(gpu, start)
    assert "mixed" not in gpu.kinds()
    images = list(dict.fromkeys(theirs.results.image_ids.tolist()))
    counts = [int((theirs.results.image_ids == image).sum()) for image in images]
    batches = [sum(counts[first : first + batch_size]) for first in range(0, IMAGES, batch_size)]
    assert found == evaluation_waits(batches, batch_size)
    network_operators = computed(gpu, "aten.convolution", "aten.addmm", first=first_operator)
    assert {part.split()[0] for operator in network_operators for part in operator.tensors} == {
        "float16" if half else "float32"
    }
    for convolution in network_operators[::2]:
        assert ["channels last" in part for part in convolution.tensors[:2]] == [True, True]
    if not half:
        for one, other in zip(ours.results, theirs.results, strict=True):
            np.testing.assert_allclose(one, other, atol=0.02)
        assert theirs.scores.metrics == ours.scores.metrics


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_a_run_computes_in_the_types_and_layouts_that_are_fast(data, tmp_path, half):
    """`main.py` from start to end: training, evaluation and checkpoint of SSD300 with few channels."""
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    line = [*("--backbone", "resnet18", "--backbone-weights", "none", "--batch-size", "2", "--eval-batch-size", "3")]
    line += [*("--epochs", "1", "--num-workers", "0", "--data_pipeline", "no_dali"), *(["--fp16"] if half else [])]
    try:
        with narrow_network(), fake_gpu() as gpu:
            assert main.main(["--data", str(data), "--output", str(tmp_path), *line]) == 0
            assert torch.backends.cudnn.benchmark
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert "mixed" not in gpu.kinds()
    convolutions = computed(gpu, "aten.convolution", "aten.convolution_backward")
    assert {part.split()[0] for one in convolutions for part in one.tensors} == {"float16" if half else "float32"}
    forward = [part for one in computed(gpu, "aten.convolution") for part in one.tensors]
    assert not [part for part in forward if "channels first" in part]
    assert any("channels last" in part for part in forward)
    steps = computed(gpu, "aten._fused_sgd_")
    assert len(steps) == 2 * IMAGES // BATCH  # weights with decay, and those without
    assert len(computed(gpu, "aten._amp_update_scale_")) == (IMAGES // BATCH if half else 0)
    # The loss and the colours are computed in float32; float64 is for suppression and for nothing before it.
    losses = computed(gpu, "aten._log_softmax", "aten.smooth_l1_loss", "aten.baddbmm")
    assert len(losses) >= 3 * IMAGES // BATCH
    assert {part.split()[0] for one in losses for part in one.tensors} == {"float32"}
    first_detection = gpu.operators.index(computed(gpu, "aten.nonzero")[0])
    double = {part for one in gpu.operators[:first_detection] for part in one.tensors if "float64" in part}
    assert double <= {"float64 [2]"}  # the two sums of the validation loss


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_a_batch_and_a_step_are_of_so_many_operators(half):
    """64 boxes in 8 images: a batch that is made image by image, or a few boxes at a time, takes more."""
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
    assert_about(second - first, BATCH_OPERATORS)
    assert_about(len(gpu.operators) - second, HALF_STEP_OPERATORS if half else STEP_OPERATORS)


def test_predictions_are_the_cpus(data, tmp_path):
    categories = [Category(1, "square"), Category(2, "disc")]
    files = sorted((data / "val2017").iterdir())[:3]
    images = ImageFiles(data / "val2017", files, 0, [])
    config = EvaluationConfig(batch_size=2, num_workers=0, amp=False)
    listed = {}
    for device in (CPU, GPU):
        with fake_gpu() as gpu:
            context = RunContext(Processes.single(device), Report.disabled(), tmp_path / device.type)
            network, first = detecting_network(device), len(gpu.events)
            done = predict(network, images, categories, config, context)
        assert "mixed" not in gpu.kinds()
        assert done.detections > 0
        listed[device] = json.loads((tmp_path / device.type / "detections.json").read_text())
    assert listed[CPU] == listed[GPU]
    # Pixels go to the GPU as they are, 3 bytes each, batch by batch.  Each picture that is drawn takes its detections.
    copied = [what for what in waits(gpu, first) if what.startswith("copy in")]
    constants = ["copy in float32 [2, 3]", "copy in float32 [8732, 4]"]
    assert copied == ["copy in uint8 [2, 3, 300, 300]", *constants, "copy in uint8 [1, 3, 300, 300]"]


def test_a_benchmark_waits_for_each_step_and_inside_it_for_no_more_than_a_run_does(gpu, data, monkeypatch):
    monkeypatch.setattr("src.benchmark.STEPS", 1)
    trainer, start = small_trainer(GPU), len(gpu.events)
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
