"""Optimizer, learning-rate schedule, the training step and one epoch of it."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import SGD, Optimizer

from src.data.pipelines.batch import Batch
from src.report.metrics import IterationMetrics
from src.report.report import Report
from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError, UserError
from src.runtime.precision import autocast
from src.runtime.preemption import GracefulShutdown
from src.ssd.loss import LossParts, MultiBoxLoss

REFERENCE_BATCH = 32  # images; --learning-rate is stated for it
DECAY = 0.1  # of the learning rate at each --multistep epoch
LOG_INTERVAL = 20  # iterations between readings of the loss
SKIPPED_STEPS = "skipped_steps"  # in the loss scaling's part of a checkpoint
NEVER = 2**62  # in the place of an iteration
ADVICE = "lower --learning-rate or lengthen --warmup; nothing was saved since"


class Schedule(NamedTuple):
    """The learning rate of every iteration, a pure function of where the run stands."""

    base: float  # for 32 images
    images: int  # an iteration, over all processes
    warmup: int  # iterations
    multistep: tuple[int, ...]  # epochs

    @property
    def peak(self) -> float:
        """The rate between the warm-up and the first multistep epoch."""
        return self.base * self.images / REFERENCE_BATCH

    def learning_rate(self, epoch: int, iteration: int) -> float:
        """iteration counts from the run's start.  Linear from 0 over the warm-up, a tenth from each multistep epoch."""
        decays = sum(epoch >= step for step in self.multistep)
        rate = self.peak * DECAY**decays
        return rate * iteration / self.warmup if iteration < self.warmup else rate


def make_optimizer(model: nn.Module, *, momentum: float, weight_decay: float) -> Optimizer:
    """SGD whose weight decay spares biases and batch-norm weights.  The rate is set in each iteration.

    model: on its device already.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    spared = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    # One kernel for all parameters: a fifth of the time of a loop over them.
    optimizer = SGD(groups, lr=0.0, momentum=momentum, fused=True)
    _prepare_momentum(optimizer)
    return optimizer


def _prepare_momentum(optimizer: Optimizer) -> None:
    """Starts every momentum that is missing at 0, and gives each the layout in memory that its weights have.

    Left to itself, the fused kernel goes on from memory that nobody has written where loss scaling skips the first
    step; and it takes weights and momentum as they lie in memory, in whatever order a checkpoint has the latter.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            momentum = optimizer.state[parameter].get("momentum_buffer")
            prepared = torch.zeros_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = prepared if momentum is None else prepared.copy_(momentum)


def _check_momentum(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint's optimizer state is not that of this network's optimizer."""
    theirs = [group["params"] for group in state["param_groups"]]
    ours = [group["params"] for group in optimizer.param_groups]
    if [len(params) for params in theirs] != [len(params) for params in ours]:
        raise UserError("--resume: optimizer.param_groups: expected those of this network; use --checkpoint instead")
    for number, parameter in zip(chain(*theirs), chain(*ours), strict=True):
        momentum = state["state"].get(number, {}).get("momentum_buffer")
        if momentum is not None and (not isinstance(momentum, Tensor) or momentum.shape != parameter.shape):
            raise UserError(
                f"--resume: optimizer.state[{number}].momentum_buffer: expected numbers of shape "
                f"{list(parameter.shape)}; use --checkpoint instead"
            )


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Makes a user's error of torch.compile's: a compiler is missing, or cannot cope with the network."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        first, *others = filter(None, str(error).splitlines())
        why = f"{first} {others[0]}" if first.endswith(":") and others else first  # older ones tell it below
        raise UserError(f"--compile: {why}: a CPU needs a C++ compiler (g++), a GPU Triton; or leave it out") from None


class Trainer:
    """The network with all that a training step needs, and the step."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer,
        device: torch.device,
        half: bool,
        processes: Processes,
        layout: torch.memory_format = torch.channels_last,
        compiled: bool = False,
    ) -> None:
        """layout: that of the model's weights, in which it gets the images too.

        compiled: train through torch.compile; the model itself, which is evaluated and saved, stays as it is.
        """
        self.model = model  # without the wrapper of several processes
        parallel = processes.wrap(model)
        self.parallel: nn.Module = cast(nn.Module, torch.compile(parallel)) if compiled else parallel
        self._explained: Callable[[], AbstractContextManager] = _compiler_errors if compiled else nullcontext
        self.optimizer = optimizer
        self.criterion = MultiBoxLoss().to(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half and device.type == "cuda")
        self.device = device
        self.half = half
        self.layout = layout
        self.breakdown = NonFiniteLossMonitor(processes, device, patient=self.scaler.is_enabled())
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        if self.scaler.is_enabled():
            optimizer.register_step_post_hook(self._count_skipped)

    def _count_skipped(self, optimizer: Optimizer, *_: object) -> None:
        """Counts a step that the loss scaling left out, on the device: it hands `found_inf` to a fused optimizer."""
        overflows: Tensor = optimizer.found_inf  # type: ignore[attr-defined]
        self._skipped += (overflows > 0).sum()

    def skipped_steps(self) -> int:
        """Steps that loss scaling left out, as gradients overflowed, since the run's start; waits for the device."""
        return int(self._skipped)

    def check_weights(self, *, epoch: int, iteration: int, learning_rate: float) -> None:
        """Raises DivergenceError, on all ranks alike, where weights or batch-norm statistics are spoilt.

        The statistics may be by a step that loss scaling has left out: the forward pass had moved them already.
        """
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        spoilt = not get_total_norm([*self.model.parameters(), *statistics]).isfinite()
        if self.breakdown.processes.all_reduce_max(int(spoilt)):  # each rank has statistics of its own
            raise DivergenceError(
                f"the weights or batch-norm statistics are not finite after epoch {epoch}, iteration {iteration} "
                f"(learning rate {learning_rate:.3g}): {ADVICE}"
            )

    def step(self, batch: Batch, learning_rate: float) -> LossParts:
        """Forward, backward and SGD on one batch; the loss's parts stay on the device, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._explained():
            with autocast(self.device, self.half):
                offsets, logits = self.parallel(batch.images.contiguous(memory_format=self.layout))
            parts = self.criterion.parts(offsets, logits, batch.boxes, batch.labels)
            self.scaler.scale(parts.localisation + parts.label).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return LossParts(parts.localisation.detach(), parts.label.detach())

    def restore(self, *, optimizer: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Takes momentum and loss scale from a checkpoint; one written without loss scaling leaves the scale new.

        The optimizer's settings stay this run's.
        """
        settings = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        _check_momentum(self.optimizer, optimizer)
        self.optimizer.load_state_dict(optimizer)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        _prepare_momentum(self.optimizer)
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)
            self._skipped.fill_(scaler.get(SKIPPED_STEPS, 0))  # older checkpoints lack it

    def scaler_state(self) -> dict[str, Any]:
        """What `restore` takes as `scaler`; empty without loss scaling."""
        state = self.scaler.state_dict()
        return {**state, SKIPPED_STEPS: self.skipped_steps()} if state else state


class NonFiniteLossMonitor:
    """Records on the device the first iteration whose loss is not finite, so that no iteration waits for the device."""

    def __init__(self, processes: Processes, device: torch.device, *, patient: bool) -> None:
        """patient: tolerate one bad reading, as loss scaling skips an overflow; a second one in a row ends the run."""
        self.processes = processes
        self.patient = patient
        self._tolerated_at: int | None = None  # iteration of the last bad reading
        self._first = torch.full((), NEVER, dtype=torch.int64, device=device)

    def observe(self, loss: Tensor, iteration: int) -> None:
        """Notes a loss that is not finite; no synchronisation."""
        bad = ~torch.isfinite(loss) & (self._first == NEVER)
        self._first = torch.where(bad, iteration, self._first)

    def check(self, *, epoch: int, iteration: int, learning_rate: float) -> None:
        """Reads the record after `iteration`, on all ranks together; raises DivergenceError on all of them."""
        first = -self.processes.all_reduce_max(-int(self._first))  # the least of all
        if first == NEVER:
            # The reading at an epoch's end may follow a bad one by an iteration, which proves no recovery.
            if self._tolerated_at is not None and iteration - self._tolerated_at >= LOG_INTERVAL:
                self._tolerated_at = None
            return
        if self.patient and self._tolerated_at is None:
            self._tolerated_at = iteration
            self._first.fill_(NEVER)
            return
        raise DivergenceError(
            f"the loss is not finite since epoch {epoch}, iteration {first} (learning rate {learning_rate:.3g}): "
            + ADVICE
        )


class EpochResult(NamedTuple):
    """What one pass did."""

    iterations: int  # done in this epoch by its end, those before a continuation included
    seconds: float
    images: int  # trained on, over all processes
    stopped: bool  # told to stop before the end


def train_epoch(
    trainer: Trainer,
    batches: Iterable[Batch],
    schedule: Schedule,
    *,
    epoch: int,
    first_iteration: int,
    start: int,
    stop: GracefulShutdown,
    report: Report,
) -> EpochResult:
    """Trains on `batches`, those of `epoch` from its iteration `start` on.

    first_iteration: the number, counted from the run's start, of the first of them.
    Raises DivergenceError when the loss is not finite.
    """
    trainer.parallel.train()
    skipped = trainer.skipped_steps()
    began = logged_at = time.perf_counter()
    done = logged = 0
    stopped = False
    for batch in batches:
        iteration = first_iteration + done
        rate = schedule.learning_rate(epoch, iteration)
        parts = trainer.step(batch, rate)
        trainer.breakdown.observe(parts.localisation + parts.label, iteration)
        done += 1
        report.advance(schedule.images)
        if iteration % LOG_INTERVAL == 0:
            trainer.breakdown.check(epoch=epoch, iteration=iteration, learning_rate=rate)
            now = time.perf_counter()
            _log(report, trainer, parts, epoch, iteration, rate, (done - logged) * schedule.images / (now - logged_at))
            logged, logged_at = done, now
        if stop.poll_all_ranks():
            stopped = True
            break
    if done:
        trainer.breakdown.check(epoch=epoch, iteration=iteration, learning_rate=rate)
        trainer.check_weights(epoch=epoch, iteration=iteration, learning_rate=rate)
        stopped = stop.finish_poll() or stopped
        skipped = trainer.skipped_steps() - skipped
        if skipped:
            report.note(f"Epoch {epoch:2d}: {skipped} steps skipped because float16 gradients overflowed")
    return EpochResult(start + done, time.perf_counter() - began, done * schedule.images, stopped)


def _log(
    report: Report,
    trainer: Trainer,
    parts: LossParts,
    epoch: int,
    iteration: int,
    rate: float,
    images_per_second: float,
) -> None:
    localisation, label = torch.stack(parts).tolist()  # one wait for the device
    metrics = IterationMetrics(
        loss=localisation + label,
        localisation_loss=localisation,
        label_loss=label,
        learning_rate=rate,
        images_per_second=images_per_second,
        loss_scale=trainer.scaler.get_scale(),
        skipped_steps=trainer.skipped_steps(),
    )
    report.log_iteration(epoch, iteration, metrics)
