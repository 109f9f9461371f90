"""What each rank does in test_distributed.py: a launcher starts `-m tests.helpers.rank_programs --data FOLDER`.

FOLDER holds the data sets that `write_data` makes; every process leaves rank-K.json there, rank 0 also arrays.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from src.data.annotations.coco import Annotations
from src.data.pipelines.batch import Batch
from src.data.pipelines.dali_pipeline import DaliTrainLoader
from src.data.pipelines.loader_config import LoaderConfig
from src.data.pipelines.loaders import PIPELINES, make_train_loader
from src.data.pipelines.torch_pipeline import EvaluationLoader, TorchTrainLoader
from src.evaluation.evaluate import Evaluation, evaluate
from src.flags import parse_args
from src.runtime import process_group
from src.runtime.distributed import Processes
from src.ssd.loss import MultiBoxLoss
from src.ssd.model import SSD300
from src.training.optimizer import make_optimizer
from src.training.schedule import Schedule
from src.training.step import Trainer
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.oracle_inputs import loss_inputs
from tests.helpers.tiny_model import use_tiny_model

CPU = torch.device("cpu")
SIZES = (5, 7, 8)  # images with boxes
EPOCHS = 2
FIRST_ID = 2**53 + 1  # of the images: float64 does not hold it
BATCH = 2  # images, of the loaders
STEPS, STEP_BATCH = 3, 8  # of the training steps, images over all processes
POSITIVES = [3, 40, 12, 0, 7, 25, 1, 60]


def write_data(folder: Path) -> None:
    """Data sets of 1, 2 and SIZES images with large boxes, and one image more without any."""
    for count in (1, 2, *SIZES):
        rng = np.random.default_rng(count)
        images = [
            {"id": FIRST_ID + i, "file_name": f"{i}.jpg", "width": 160, "height": 120}
            for i in range(count + (count > 2))
        ]
        boxes = [
            annotation(FIRST_ID + i, [*rng.uniform(0, 40, 2), *rng.uniform(60, 79, 2)], 1 + i % 2) for i in range(count)
        ]
        write_coco(folder / str(count), boxes, images=images)


class SmallNetwork(nn.Module):
    """SSD300's output shapes from 12,000 times less arithmetic; with batch-norm."""

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 7, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, (4 + labels) * 8732)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(self.body(images).flatten(1)).view(len(images), -1, 8732)
        return outputs[:, :4], outputs[:, 4:]


def small_network() -> SmallNetwork:
    """In evaluation mode, in which batch-norm does not see who is beside an image in its batch."""
    torch.manual_seed(3)
    network = SmallNetwork().eval()
    with torch.no_grad():
        network.body[1].running_mean.uniform_(-0.2, 0.2)
        network.body[1].running_var.uniform_(0.5, 2)
    return network


def step_batch(default_boxes: np.ndarray) -> Batch:
    """The fixed batch of the training steps, over all processes."""
    _, _, boxes, labels = loss_inputs(5, POSITIVES, default_boxes)
    images = torch.randn(STEP_BATCH, 3, 300, 300, generator=torch.Generator().manual_seed(6))
    return Batch(images, boxes, labels.clamp(max=2))


def train_steps(processes: Processes, folder: Path) -> str:
    """Trains on this rank's share of the fixed batch; a digest of the weights, which rank 0 leaves in weights.pt."""
    network = small_network().to(processes.device)
    optimizer = make_optimizer(network, momentum=0.9, weight_decay=5e-4)
    trainer = Trainer(network, optimizer, processes, amp=False)
    share = STEP_BATCH // processes.world_size
    schedule = Schedule(base_learning_rate=2.6e-3, global_batch_size=share * processes.world_size)
    rows = slice(processes.rank * share, (processes.rank + 1) * share)
    whole = step_batch(np.load(folder / "default_boxes.npy"))
    batch = Batch(*(part[rows].to(processes.device) for part in whole))
    for step in range(STEPS):
        trainer.step(batch, schedule.learning_rate(0, step))
    network.cpu()
    if processes.is_main:
        torch.save(network.state_dict(), folder / "weights.pt")
    return digest_of(network.state_dict().values())


def steps_by_hand(default_boxes: np.ndarray) -> dict[str, torch.Tensor]:
    """The weights that `train_steps` should reach, computed on the whole batch by the formulas of SGD with momentum."""
    network, batch = small_network(), step_batch(default_boxes)
    rate = 2.6e-3 * STEP_BATCH / 32
    velocity = dict.fromkeys(dict(network.named_parameters()), 0)
    for _ in range(STEPS):
        loss = MultiBoxLoss()(*network(batch.images), batch.boxes, batch.labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
                decay = 5e-4 if parameter.dim() > 1 else 0
                velocity[name] = 0.9 * velocity[name] + gradient + decay * parameter
                parameter -= rate * velocity[name]
    return network.state_dict()


def shared_buffers(processes: Processes) -> str:
    """A digest of the batch-norm statistics that every rank has after they were shared, each other ones before."""
    network = small_network().to(processes.device)
    network.body[1].running_mean.fill_(processes.rank)
    processes.broadcast_buffers(network)
    assert not network.body[1].running_mean.any()
    return digest_of(network.cpu().buffers())


def digest_of(tensors: Iterable[Tensor]) -> str:
    return digest(torch.cat([tensor.flatten().double() for tensor in tensors]))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy())).hexdigest()


def images_of_epochs(annotations: Annotations, pipeline: str, processes: Processes) -> list[list[int]]:
    """For each epoch, which image stands at each place of this rank's batches, known by its pixels."""
    loader_class = {"dali": DaliTrainLoader, "no_dali": TorchTrainLoader}[pipeline]
    config = LoaderConfig(batch_size=BATCH, num_workers=0, device=CPU, shard=processes.shard)
    loader = loader_class(annotations, config, augment=False)
    every = EvaluationLoader(annotations, LoaderConfig(batch_size=1, num_workers=0, device=CPU))
    known = {int(index): image[0] for image, index in every}
    epochs = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        shown = [image for batch in loader for image in batch.images]
        epochs.append([min(known, key=lambda index: (known[index] - image).abs().mean()) for image in shown])
    loader.close()
    return epochs


def augmented_digests(annotations: Annotations, pipeline: str, processes: Processes) -> list[str]:
    """Of every augmented image that this rank gets in some epochs."""
    config = LoaderConfig(batch_size=BATCH, num_workers=0, device=CPU, shard=processes.shard)
    loader = make_train_loader(pipeline, annotations, config)
    found = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        found += [digest(image) for batch in loader for image in batch.images]
    loader.close()
    return found


def evaluation(annotations: Annotations, processes: Processes) -> Evaluation:
    """Evaluates the tiny model with random weights; only its large default boxes detect, so that some hit."""
    torch.manual_seed(1)
    with use_tiny_model():
        network = SSD300("resnet18", 3)
    with torch.no_grad():
        for head in network.conf[:3]:
            head.bias[: len(head.bias) // 3] += 20
    # Images one by one: the arithmetic of a convolution depends on its batch in the last digit.
    config = LoaderConfig(batch_size=1, num_workers=0, device=CPU, shard=processes.shard)
    loader = EvaluationLoader(annotations, config)
    return evaluate(network, loader, annotations, processes=processes)


def main(folder: Path, local_rank: int) -> None:
    torch.set_num_threads(1)
    with process_group.start(local_rank) as processes:
        report = {"local_rank": local_rank, "world_size": processes.world_size, "device": str(processes.device)}
        report["buffers"] = shared_buffers(processes)
        if STEP_BATCH % processes.world_size == 0:
            report["weights"] = train_steps(processes, folder)
        report["images"] = {
            f"{pipeline} {count}": images_of_epochs(read(folder / str(count)), pipeline, processes)
            for pipeline in PIPELINES
            for count in SIZES
        }
        report["augmented"] = {name: augmented_digests(read(folder / "1"), name, processes) for name in PIPELINES}
        report["metrics"] = {}
        for count in (2, 8):
            found = evaluation(read(folder / str(count), "val", for_scoring=True), processes)
            report["metrics"][count] = found.coco_metrics.summary
            if processes.is_main:
                np.savez(folder / f"results-{count}.npz", **found.results._asdict())
        rank = os.environ["RANK"]
        (folder / f"rank-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    args = parse_args()
    main(args.data, args.local_rank)
