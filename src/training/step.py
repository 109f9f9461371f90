"""The training step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from src.data.pipelines.batch import Batch
from src.runtime.distributed import Processes
from src.runtime.errors import DivergenceError, UserError
from src.runtime.precision import autocast
from src.ssd.loss import LossParts, MultiBoxLoss
from src.training.divergence import ADVICE, NonFiniteLossMonitor
from src.training.optimizer import check_momentum, create_momentum_buffers

SKIPPED_STEPS = "skipped_steps"  # in the loss scaling's part of a checkpoint


@contextmanager
def _convert_compile_errors() -> Iterator[None]:
    """Raises UserError if torch.compile fails: a compiler is missing or cannot compile the network."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        first, *others = filter(None, str(error).splitlines())
        why = f"{first} {others[0]}" if first.endswith(":") and others else first  # older torch
        raise UserError(f"--compile: {why}: a CPU needs a C++ compiler (g++), a GPU Triton; or leave it out") from None


class Trainer:
    """A training step, with the network and everything else that it needs."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        processes: Processes,
        *,
        amp: bool,
        memory_format: torch.memory_format = torch.channels_last,
        compiled: bool = False,
    ) -> None:
        """amp: automatic mixed precision, with loss scaling on a GPU.  memory_format: of the model's weights.

        compiled: train through torch.compile; `model`, which is evaluated and saved, stays uncompiled.
        """
        device = processes.device
        self.model = model  # not wrapped for several processes
        parallel = processes.wrap(model)
        self.training_model: nn.Module = cast(nn.Module, torch.compile(parallel)) if compiled else parallel
        self._converting_compile_errors: Callable[[], AbstractContextManager] = (
            _convert_compile_errors if compiled else nullcontext
        )
        self.optimizer = optimizer
        self.criterion = MultiBoxLoss().to(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")
        self.processes = processes
        self.device = device
        self.amp = amp
        self.memory_format = memory_format
        self.loss_monitor = NonFiniteLossMonitor(processes, device, tolerate_one=self.scaler.is_enabled())
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        if self.scaler.is_enabled():
            optimizer.register_step_post_hook(self._count_skipped)

    def _count_skipped(self, optimizer: Optimizer, *_: object) -> None:
        """Counts a skipped step, on the device: GradScaler sets `found_inf` on a fused optimizer."""
        overflows: Tensor = optimizer.found_inf  # type: ignore[attr-defined]
        self._skipped += (overflows > 0).sum()

    def skipped_steps(self) -> int:
        """The number of steps since the run's start that loss scaling skipped for an overflow; waits for the device."""
        return int(self._skipped)

    def check_weights(self, *, epoch: int, iteration: int, learning_rate: float) -> None:
        """Raises DivergenceError, on all ranks, if weights or batch-norm statistics are not finite.

        The statistics may break in a step that loss scaling skips: the forward pass has updated them by then.
        """
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        non_finite = not get_total_norm([*self.model.parameters(), *statistics]).isfinite()
        if self.processes.all_reduce_max(int(non_finite)):  # each rank has statistics of its own
            raise DivergenceError(
                f"the weights or batch-norm statistics are not finite after epoch {epoch}, iteration {iteration} "
                f"(learning rate {learning_rate:.3g}): {ADVICE}"
            )

    def step(self, batch: Batch, learning_rate: float) -> LossParts:
        """Runs forward, backward and SGD on one batch; returns the two losses, detached, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._converting_compile_errors():
            with autocast(self.device, self.amp):
                offsets, logits = self.training_model(batch.images.contiguous(memory_format=self.memory_format))
            parts = self.criterion.parts(offsets, logits, batch.boxes, batch.labels)
            self.scaler.scale(parts.localisation + parts.label).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return LossParts(parts.localisation.detach(), parts.label.detach())

    def restore(self, *, optimizer: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Takes momentum and loss scale from a checkpoint; the optimizer keeps the settings of this run.

        A checkpoint that was written without loss scaling leaves the initial scale.  Raises UserError if the momentum
        is another network's.
        """
        run_settings = [
            {name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups
        ]
        check_momentum(self.optimizer, optimizer)
        self.optimizer.load_state_dict(optimizer)
        for group, settings in zip(self.optimizer.param_groups, run_settings, strict=True):
            group.update(settings)
        create_momentum_buffers(self.optimizer)
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)
            self._skipped.fill_(scaler.get(SKIPPED_STEPS, 0))  # older checkpoints lack it

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaling's part of a checkpoint, for `restore`; empty without loss scaling."""
        state = self.scaler.state_dict()
        return {**state, SKIPPED_STEPS: self.skipped_steps()} if state else state
