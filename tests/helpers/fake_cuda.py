"""A fake GPU: runs the program's CUDA code on tensors that claim to be on cuda:0.

Their values are in host memory and the CPU's kernels compute every operator, so results can be compared with the CPU's.
The fake GPU records where a real one would make the host wait, copies between the two memories, and operators that mix
tensors of both.  It cannot see kernels that CUDA lacks, other rounding, waits inside kernels that WAITING does not
name, and other threads (a DataLoader's workers and its pinning thread).
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torchvision  # noqa: F401 (registers its operators)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# The host needs a value, or the number of values, before it can continue.
WAITING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    torch.ops.torchvision.nms.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPYING = {aten._to_copy.default, aten.copy_.default}
# Modules that cache tensors of a device.
CACHING = ("src.data.", "src.evaluation.", "src.ssd.", "src.training.")


class Event(NamedTuple):
    """A wait, a copy or a mix of devices that an operator caused."""

    kind: str  # "wait": the host waits for the GPU; "copy in": from pinned memory, without a wait; "mixed": devices
    what: str  # the operator, or "copy in" and "copy out" for copies that wait; with dtypes and shapes

    def __repr__(self) -> str:
        return f"{self.kind}: {self.what}"


class Operator(NamedTuple):
    """An operator that computed on the GPU; views are not recorded."""

    name: str  # such as "aten.convolution"
    tensors: tuple[str, ...]  # its arguments on the GPU, such as "float16 [2, 3, 300, 300] channels last"

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(self.tensors)})"


class GpuTensor(Tensor):
    """A tensor that claims to be on cuda:0; `held` has its values."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "GpuTensor":
        return Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"GpuTensor({self.dtype} {list(self.shape)})"

    def tolist(self) -> list:
        return self.cpu().tolist()  # torch's own does not support subclasses

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise AssertionError(f"{operator} outside of FakeGpu")


class FakeGpu(TorchDispatchMode):
    """Inside it cuda:0 can be used; records `events` and `operators`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.operators: list[Operator] = []
        self._pinned: dict[
            int, torch.UntypedStorage
        ] = {}  # by address; kept, so that no other storage gets the address

    def kinds(self, first: int = 0) -> set[str]:
        """The kinds of the events from number `first` on."""
        return {event.kind for event in self.events[first:]}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if operator._can_decompose():  # in inference mode autograd does not decompose it
            with self:
                return operator.decompose(*args, **kwargs)
        if operator is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if operator is aten._pin_memory.default:
            return self._pin(args[0].clone())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        asked = kwargs.get("device")
        to_gpu = bool(on_gpu) if asked is None else asked.type == "cuda"
        if operator is aten.copy_.default:
            to_gpu = isinstance(args[0], GpuTensor)
        self._record(operator, args, kwargs, tensors, on_gpu, to_gpu)
        if (on_gpu or to_gpu) and not operator.is_view:
            described = tuple(_describe("", tensor) + _describe_memory_format(tensor) for tensor in on_gpu)
            self.operators.append(
                Operator(str(operator).partition(".")[0] + "." + operator.overloadpacket.__name__, described)
            )
        if asked is not None:
            kwargs["device"] = CPU
        pin = kwargs.pop("pin_memory", False)
        result = operator(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        if not to_gpu:
            return self._pin(result) if pin else result
        known = {id(tensor.held): tensor for tensor in on_gpu}  # an in-place operator returns its argument
        # A view of a tensor from outside inference mode counts as made outside, too.
        of_normal = operator.is_view and not all(tensor.is_inference() for tensor in on_gpu)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not of_normal):
            return tree_map(lambda one: known[id(one)] if id(one) in known else _wrap(one), result)

    def _record(self, operator, args, kwargs, tensors: list, on_gpu: list, to_gpu: bool) -> None:
        if operator in COPYING:
            self._record_copy(operator, args, kwargs, to_gpu)
        elif on_gpu and len(on_gpu) < len(tensors):
            host_tensors = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
            if any(tensor.dim() for tensor in host_tensors) and operator not in INDEXING:
                raise RuntimeError(f"{operator}: expected all tensors on one device, found cuda:0 and cpu")
            self.events.append(Event("mixed", _describe(str(operator), *host_tensors)))
        masks = operator in INDEXING and any(_is_mask(index) for index in args[1])
        if on_gpu and (operator in WAITING or masks):
            self.events.append(Event("wait", _describe(str(operator), *on_gpu)))

    def _record_copy(self, operator, args, kwargs, to_gpu: bool) -> None:
        source = args[1] if operator is aten.copy_.default else args[0]
        if isinstance(source, GpuTensor) == to_gpu:
            return
        without_waiting = kwargs.get("non_blocking") or (operator is aten.copy_.default and args[2:] == (True,))
        if to_gpu and without_waiting and self._is_pinned(source):
            self.events.append(Event("copy in", _describe("", source)))
        else:
            self.events.append(Event("wait", _describe("copy in" if to_gpu else "copy out", source)))

    def _is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, GpuTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor


def _unwrap(one):
    return one.held if isinstance(one, GpuTensor) else one


def _wrap(one):
    return GpuTensor(one) if isinstance(one, Tensor) else one


def _is_mask(index) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _describe(what: str, *tensors: Tensor) -> str:
    parts = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    return " ".join(filter(None, [what.removesuffix(".default"), *parts]))


def _describe_memory_format(tensor: Tensor) -> str:
    """The memory format of a tensor of 4 dimensions; empty for others."""
    if tensor.dim() != 4 or tensor.is_contiguous() == tensor.is_contiguous(memory_format=torch.channels_last):
        return ""  # with a size of 1 it may be both
    return " channels last" if tensor.is_contiguous(memory_format=torch.channels_last) else " channels first"


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside, the program finds one GPU and can make and compute with its tensors."""
    # Without a GPU, this lets autograd ask for the stream of a GPU tensor, for the rest of the process.
    torch._C._ensureCUDADeviceGuardSet()
    gpu = FakeGpu()
    replaced = {
        "_lazy_init": lambda: None,
        "current_device": lambda: GPU.index,
        "current_stream": lambda device=None: None,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "fake GPU",
        "get_device_properties": lambda device=None: SimpleNamespace(name="fake GPU", uuid="GPU-0"),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda device=None: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: gpu.events.append(Event("wait", "synchronize")),
    }
    overwrite, lift = torch.__future__.get_overwrite_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `Module.to` makes new parameters
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` copies through the mode
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # only CUDA has its operators
        stack.callback(_clear_caches)
        _clear_caches()
        stack.enter_context(mock.patch.multiple(torch.cuda, **replaced))
        stack.enter_context(
            mock.patch.multiple(torch.accelerator, is_available=lambda: True, current_accelerator=lambda: GPU)
        )
        stack.enter_context(mock.patch.object(Tensor, "backward", backward))
        yield stack.enter_context(gpu)


def _clear_caches() -> None:
    """Clears the program's caches, which may hold tensors of another device."""
    for name, module in list(sys.modules.items()):
        if name.startswith(CACHING):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`Tensor.backward` in Python, because autograd's engine needs a CUDA context.  Adds to the leaves' gradients."""
    pending = {loss.grad_fn: [torch.ones_like(loss)]}
    while pending:
        # Nodes are numbered after their inputs' nodes, so the node with the highest number has all its gradients.
        node = max(pending, key=lambda one: one._sequence_nr())
        gradients = node(*pending.pop(node))
        for gradient, (following, number) in zip(_as_tuple(gradients), node.next_functions, strict=True):
            if following is None or gradient is None:
                continue
            inputs = following._input_metadata
            gradient = gradient.sum_to_size(inputs[number].shape).to(inputs[number].dtype)
            assert gradient.device == inputs[number].device, following
            if hasattr(following, "variable"):
                leaf = following.variable
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            arrived = pending.setdefault(following, [None] * len(inputs))
            arrived[number] = gradient if arrived[number] is None else arrived[number] + gradient


def _as_tuple(gradients: Tensor | tuple | None) -> tuple:
    return gradients if isinstance(gradients, tuple) else (gradients,)
