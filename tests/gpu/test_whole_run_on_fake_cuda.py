"""Whole runs on a fake GPU: `main.py` and the benchmark compute in the dtypes and memory formats that are fast.

A failed test prints the events: the operators that waited or copied, with types and shapes.
"""

import pytest
import torch

import main
from src.benchmark import WARM_UP, benchmark
from src.report.report import Report
from tests.helpers.fake_cuda import GPU, fake_gpu
from tests.helpers.fake_cuda_runs import (
    BATCH,
    HOST_BATCH,
    IMAGES,
    annotations_of,
    computed,
    dtypes,
    small_trainer,
    torch_loader,
)
from tests.helpers.tiny_model import use_tiny_model


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_a_run_computes_in_the_fast_dtypes_and_memory_formats(data, tmp_path, half):
    """`main.py` trains, evaluates and saves SSD300 with few channels."""
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    line = [*("--backbone", "resnet18", "--backbone-weights", "none", "--batch-size", "2", "--eval-batch-size", "3")]
    line += [*("--epochs", "1", "--num-workers", "0", "--data_pipeline", "no_dali"), *(["--fp16"] if half else [])]
    try:
        with use_tiny_model(), fake_gpu() as gpu:
            assert main.main(["--data", str(data), "--output", str(tmp_path), *line]) == 0
            assert torch.backends.cudnn.benchmark
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert "mixed" not in gpu.kinds()
    convolutions = computed(gpu, "aten.convolution", "aten.convolution_backward")
    assert dtypes(convolutions) == {"float16" if half else "float32"}
    forward = [part for one in computed(gpu, "aten.convolution") for part in one.tensors]
    assert not [part for part in forward if "channels first" in part]
    assert any("channels last" in part for part in forward)
    steps = computed(gpu, "aten._fused_sgd_")
    assert len(steps) == 2 * IMAGES // BATCH  # weights with decay, and those without
    assert len(computed(gpu, "aten._amp_update_scale_")) == (IMAGES // BATCH if half else 0)
    # Loss and colours are computed in float32; only suppression needs float64.
    losses = computed(gpu, "aten._log_softmax", "aten.smooth_l1_loss", "aten.baddbmm")
    assert len(losses) >= 3 * IMAGES // BATCH
    assert dtypes(losses) == {"float32"}
    first_detection = gpu.operators.index(computed(gpu, "aten.nonzero")[0])
    double = {part for one in gpu.operators[:first_detection] for part in one.tensors if "float64" in part}
    assert double <= {"float64 [2]"}  # the two sums of the validation loss


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16"])
def test_a_benchmark_waits_after_each_step_and_inside_it_only_as_a_run_does(gpu, data, monkeypatch, half):
    monkeypatch.setattr("src.benchmark.STEPS", 1)
    trainer, start = small_trainer(GPU, half=half), len(gpu.events)
    benchmark(
        trainer,
        torch_loader(data, GPU, half),
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
    assert detecting[2:] == detecting[1:2] * (WARM_UP - 1)  # the first copies the default boxes
    assert dtypes(computed(gpu, "aten.convolution", "aten.addmm")) == {"float16" if half else "float32"}
    casts = [one for one in computed(gpu, "aten._to_copy") if "float32 [2, 3, 300, 300] channels last" in one.tensors]
    assert len(casts) == (WARM_UP + 1 if half else 0)  # of real batches after normalising; noise is float16 already
    assert "mixed" not in gpu.kinds()
