"""What only a GPU can show: `make test-gpu`.  What these tests share with the CPU runs there as well."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

import main
from src.benchmark import endless, random_batch
from src.data.images.decode import decode, resize
from src.data.pipelines.augment import colour_matrix
from src.data.pipelines.batch import colour_and_normalise
from src.data.pipelines.dali_graph import OUTPUTS
from src.runtime import distributed
from src.runtime.precision import image_dtype
from src.ssd.model import SSD300
from src.training.step import Trainer
from src.weights.files import load_checkpoint
from tests.helpers import rank_programs
from tests.helpers.both_pipelines import train_loader
from tests.helpers.dali_loaders import loader, random_annotations
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.launch import SMALL, TINY_MODEL, command, launch
from tests.helpers.small_runs import flags
from tests.helpers.trainers import make_trainer

GPU = torch.device("cuda", 0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PIPELINES = ["dali", "no_dali"]
BATCHES = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco(
        tmp_path_factory.mktemp("data"), [annotation(image, (30, 20, 90, 80), 1 + image % 2) for image in range(1, 5)]
    )


def device_of(name: str) -> torch.device:
    return GPU if name == "cuda" else torch.device(name)


def on_host(part: torch.Tensor) -> torch.Tensor:
    return part.cpu().float()


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_dalis_windows_flips_and_colours_are_those_that_it_drew(tmp_path, device):
    """Made again by torchvision from the file."""
    annotations = random_annotations(tmp_path, 12)
    ours = loader(annotations, batch_size=12, device=device_of(device))
    pipeline = ours.build((*OUTPUTS, "colour", "anchor", "shape", "flip"))
    outputs = [np.asarray(output.as_cpu().as_tensor()) for output in pipeline.run()]
    images, _, _, ids, _, colours, corners, sides, flips = outputs
    ours.set_epoch(0)
    batch = next(iter(ours))
    assert 0 < flips.sum() < len(flips)
    assert (sides < 1).any()
    for number in range(len(images)):
        picture = decode(annotations.image_path(int(ours.image_indices[ids[number, 0]])))
        size = np.array([picture.shape[2], picture.shape[1]])
        left, top = np.rint(corners[number] * size).astype(int)
        right, bottom = np.rint((corners[number] + sides[number]) * size).astype(int)
        window = resize(picture[:, top:bottom, left:right])
        window = window.flip(2) if flips[number] else window
        shown = torch.from_numpy(images[number]).permute(2, 0, 1)
        assert (shown.float() - window.float()).abs().mean() < 1.5, number
    matrices = torch.from_numpy(colour_matrix(*colours.T))
    expected = colour_and_normalise(torch.from_numpy(images).permute(0, 3, 1, 2), matrices)
    assert (on_host(batch.images) - expected).abs().max() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_without_dali_is_the_cpus(data, workers):
    annotations = read(data)
    options = {"augment": True, "batch_size": 2, "num_workers": workers}
    ours = list(train_loader("no_dali", annotations, **options))
    theirs = list(train_loader("no_dali", annotations, **options, device=GPU))
    for one, other in zip(ours, theirs, strict=True):
        assert all(part.device == GPU for part in other)
        assert (on_host(other.images) - one.images).abs().max() < 0.01
        assert torch.equal(other.labels.cpu(), one.labels)
        torch.testing.assert_close(other.boxes.cpu(), one.boxes)


@pytest.mark.gpu
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_memory_does_not_grow(data, pipeline):
    """Torch's, and all that is taken of the card, by DALI too."""
    batches = endless(train_loader(pipeline, read(data), augment=True, batch_size=2, device=GPU))
    assert len(list(islice(batches, 20))) == 20
    torch.cuda.synchronize()
    allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    for _ in islice(batches, BATCHES):
        pass
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - allocated < 2**20 * 10  # a batch is 2 MiB
    assert free - torch.cuda.mem_get_info()[0] < 2**20 * 64


# --- training --------------------------------------------------------------------------------------------------------


def train(device: torch.device, *, half: bool, steps: int) -> Iterator[Trainer]:
    """The trainer, after each step."""
    model = SSD300("resnet18", 3).to(device, memory_format=torch.channels_last).train()
    trainer = make_trainer(model, half=half, device=device)
    batch = random_batch(2, 3, device=device, dtype=image_dtype(device, half))
    for step in range(steps):
        parts = trainer.step(batch, 1e-4)
        trainer.loss_monitor.observe(parts.localisation + parts.label, step)
        yield trainer


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_from_the_second_step_on_the_host_never_waits(half):
    steps = train(GPU, half=half, steps=5)
    next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            trainer = next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.loss_monitor.check(epoch=0, iteration=0, learning_rate=1e-4)


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.gpu
def test_every_mode_runs(data, tmp_path, capsys, pipeline, half):
    more = ["--data_pipeline", pipeline, *(["--fp16"] if half else [])]
    assert main.main(flags(data, tmp_path / "run", *more)) == main.DONE
    trained = ["--checkpoint", str(tmp_path / "run" / "last.pt"), *more]
    for mode, folder in (("evaluation", data), ("prediction", data / "val2017"), ("check", data), ("benchmark", data)):
        asked = more if mode in ("check", "benchmark") else trained
        assert main.main(flags(folder, tmp_path / mode, "--mode", mode, *asked)) == main.DONE, mode
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"iteration", "epoch", "evaluation"} <= {line["kind"] for line in lines}
    assert len(list((tmp_path / "prediction").glob("*.jpg.png"))) == 4
    assert f"Device: {torch.cuda.get_device_name(0)}" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny_model")
def test_a_run_is_continued_on_another_device(data, tmp_path, monkeypatch, capsys):
    """At the end of an epoch; inside one dali wants the same device, and says so."""
    for epochs, name in enumerate(("cuda", "cpu", "cuda"), 1):
        monkeypatch.setattr(distributed, "choose_device", lambda rank, name=name: device_of(name))
        more = ["--data_pipeline", "dali", "-e", str(epochs), "--evaluation", "--resume"]
        assert main.main(flags(data, tmp_path, *more)) == main.DONE
        state = load_checkpoint(tmp_path / "last.pt")
        assert (state["epoch"], state["iteration"]) == (epochs, 2 * epochs)
        for weights in state["model"].values():
            assert weights.device.type == "cpu"
            assert weights.isfinite().all()
    assert capsys.readouterr().err.count("the DALI pipeline starts afresh") == 2


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_two_gpus_take_the_steps_of_one_and_share_buffers(tmp_path, oracle):
    defaults = oracle("default_boxes.npz")["xywh"]
    rank_programs.write_data(tmp_path)
    np.save(tmp_path / "default_boxes.npy", defaults)
    done = launch(command(("-m", "tests.helpers.rank_programs", "--data", tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [report["device"] for report in reports] == ["cuda:0", "cuda:1"]
    assert reports[0]["weights"] == reports[1]["weights"]
    assert reports[0]["buffers"] == reports[1]["buffers"]
    start = rank_programs.small_network().state_dict()
    expected = rank_programs.steps_by_hand(defaults)
    for name, weights in torch.load(tmp_path / "weights.pt").items():
        moved = (expected[name] - start[name]).double()
        assert (weights - expected[name]).double().norm() <= 1e-2 * moved.norm(), name


def first_program_line(text: str) -> str:
    (message,) = re.findall(r"^main\.py: error: (.*)$", text, re.MULTILINE)
    return message


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("fault", "said"),
    [("raise 1 1", "rank 1: a fault of the program:"), ("SIGKILL 1 1", "rank 0: lost touch with rank 1")],
)
def test_a_rank_that_fails_ends_both_with_one_message(data, tmp_path, fault, said):
    line = [*TINY_MODEL, "--data", data, "--output", tmp_path, "--epochs", 1000, *SMALL]
    done = launch(command(line), FAULT=fault)
    assert done.returncode != 0
    assert first_program_line(done.stderr).startswith(said)
    assert "destroy_process_group" not in done.stderr


@pytest.mark.gpu
def test_two_processes_on_one_gpu_are_refused_by_name(data, tmp_path):
    line = [*TINY_MODEL, "--data", data, "--output", tmp_path, *SMALL]
    done = launch(command(line), CUDA_VISIBLE_DEVICES="0")
    assert done.returncode != 0
    assert re.search(
        r"ranks 0 and 1 are on one GPU, .+: start one process for each GPU", first_program_line(done.stderr)
    )
