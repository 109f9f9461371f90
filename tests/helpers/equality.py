"""Equality of nested values that hold tensors."""

import torch


def same(one, other) -> bool:
    """Whether two batches, states or lists of them are equal: tensors bit for bit, dicts in the same order."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
