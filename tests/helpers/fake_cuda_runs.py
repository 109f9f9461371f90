"""Parts of the program for a fake GPU, and ways to read what it recorded; for the tests in tests/gpu."""

from pathlib import Path

import torch

from src.data.annotations.coco import Annotations, locations, read_annotations
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.torch_pipeline import TorchTrainLoader
from src.training.step import Trainer
from tests.helpers.fake_cuda import FakeGpu, GpuTensor, Operator
from tests.helpers.rank_programs import small_network
from tests.helpers.trainers import make_trainer

IMAGES, BATCH, LABELS = 6, 2, 3
# The copies of an iteration, all from pinned memory: a HostBatch whose images have a box each.
HOST_BATCH = ["uint8 [2, 3, 300, 300]", "float32 [2, 3, 4]", "float32 [2, 4]", "int64 [2]", "int64 [2]"]


def annotations_of(data: Path, split: str = "train") -> Annotations:
    return read_annotations(*locations(data, split), for_scoring=True)


def torch_loader(data: Path, device: torch.device, half: bool = False) -> TorchTrainLoader:
    return TorchTrainLoader(
        annotations_of(data), LoaderConfig(batch_size=BATCH, num_workers=0, device=device, amp=half)
    )


def small_trainer(device: torch.device, *, half: bool = False) -> Trainer:
    return make_trainer(small_network().to(device, memory_format=torch.channels_last), device=device, half=half)


def detecting_network(device: torch.device) -> torch.nn.Module:
    """A network that detects a few of the largest default boxes in each image, different ones in different images."""
    model = small_network()
    with torch.no_grad():
        bias = model.head.bias.view(4 + LABELS, 8732)
        bias[4] += 6  # background
        bias[5:, -40:] += 6
    return model.to(device, memory_format=torch.channels_last)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values, in host memory."""
    return tensor.held if isinstance(tensor, GpuTensor) else tensor


def waits_and_copies(gpu: FakeGpu, first: int = 0) -> list[str]:
    """The events from number `first` on: operators that wait, copies that wait, and pinned copies, which do not."""
    found = []
    for kind, what in gpu.events[first:]:
        if kind == "wait":
            found.append(what if what.startswith("copy") else what.split()[0])
        else:
            found.append(f"{'pinned ' if kind == 'copy in' else ''}{kind} {what}")
    return found


def computed(gpu: FakeGpu, *names: str, first: int = 0) -> list[Operator]:
    """The operators with these names that computed on the GPU, from number `first` on."""
    return [operator for operator in gpu.operators[first:] if operator.name in names]


def assert_about(count: int, today: int) -> None:
    """Within 10% of the number of operators today: more or fewer are another method."""
    assert 0.9 * today <= count <= 1.1 * today, count


def dtypes(operators: list[Operator]) -> set[str]:
    """The dtypes of all tensors that these operators took."""
    return {part.split()[0] for operator in operators for part in operator.tensors}
