"""The optimizer and its momentum buffers."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from src.runtime.errors import UserError


def make_optimizer(model: nn.Module, *, momentum: float, weight_decay: float) -> Optimizer:
    """SGD without weight decay on biases and batch-norm weights; `Trainer.step` sets the learning rate.

    model: already on its device.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    spared = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    # Fused: one kernel for all parameters takes a fifth of the time of a loop over them.
    optimizer = SGD(groups, lr=0.0, momentum=momentum, fused=True)
    create_momentum_buffers(optimizer)
    return optimizer


def create_momentum_buffers(optimizer: Optimizer) -> None:
    """Creates missing momentum buffers as zeros and gives each buffer the memory format of its weights.

    Fused SGD reads an uninitialised buffer if loss scaling skips the first step.  It also pairs weights and momentum
    by their position in memory, so a buffer that a checkpoint holds in another memory format would be mixed up.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            momentum = optimizer.state[parameter].get("momentum_buffer")
            prepared = torch.zeros_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = prepared if momentum is None else prepared.copy_(momentum)


def check_momentum(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raises UserError if a checkpoint's optimizer state does not fit this network's optimizer."""
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
