"""A GPU that is pretended: tensors lie on the CPU, and are taken to be on ``cuda:0``.

What is asked for on ``"cuda"`` or moved there is marked, by its storage, and so is what is made of
it. As torch does it on a GPU, operations refuse marked tensors beside others that are not, and
marked ones have no ``numpy()``; and ``device`` is what it would be. Numbers are the CPU's, so a
calculation must give its bits, if nothing reads a result before it is there.

That is not pretended: streams, so neither what is read too early; kernels, their rounding, or that
there is none for something; memory that ends.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_ATEN = torch.ops.aten
_COPIES = (_ATEN.copy_.default,)
# Of these an index may be on the CPU, whatever it is an index of.
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default)
_MOVING = (Tensor.to, Tensor.cpu, Tensor.cuda)


class Marks:
    """Storages on the pretended GPU. They are kept, since another could have the same address."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.pinned = 0
        self.copies_to_host = 0

    def mark(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        return tensor

    def has(self, tensor: Tensor) -> bool:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return tensor.untyped_storage()._cdata in self._storages

    def moved(self, tensor: Tensor, device: torch.device | None) -> Tensor:
        """A copy there, or the tensor itself if it is there."""
        if device is None or (device.type == "cuda") == self.has(tensor):
            return tensor
        self.copies_to_host += device.type == "cpu"
        with torch._C.DisableTorchFunction():
            copied = tensor.detach().clone()
        return self.mark(copied) if device.type == "cuda" else self._unmarked(copied)

    def _unmarked(self, tensor: Tensor) -> Tensor:
        self._storages.pop(tensor.untyped_storage()._cdata)
        return tensor


class _Operations(TorchDispatchMode):
    """Every operation, below autograd and vmap."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        checked = (args[0], kwargs) if func in _INDEXED else (args, kwargs)
        tensors = [each for each in tree_flatten(checked)[0] if isinstance(each, Tensor)]
        here = [each for each in tensors if self._marks.has(each)]
        # A number on the CPU may take part in anything.
        other = [each for each in tensors if each.dim() and not self._marks.has(each)]
        if here and other and func not in _COPIES:
            shapes = [tuple(each.shape) for each in (*here, *other)]
            raise RuntimeError(f"{func} of tensors on cuda:0 and cpu: {shapes}")
        found = func(*args, **kwargs)
        if here and func not in _COPIES:
            for each in tree_flatten(found)[0]:
                if isinstance(each, Tensor):
                    self._marks.mark(each)
        elif func in _COPIES and self._marks.has(args[1]) and not self._marks.has(args[0]):
            self._marks.copies_to_host += 1
        return found


class _Calls(TorchFunctionMode):
    """What names devices, which torch would ask CUDA for."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self._marks = marks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if self._marks.has(args[0]) else CPU
        if func == Tensor.is_cuda.__get__:
            return self._marks.has(args[0])
        if func in (Tensor.numpy, Tensor.__array__) and self._marks.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func == Tensor.pin_memory:
            assert not self._marks.has(args[0]), "only memory of the host can be pinned"
            self._marks.pinned += 1
            return args[0].clone()
        if func in _MOVING:
            return self._move(func, args, kwargs)
        self._marks.pinned += bool(kwargs.pop("pin_memory", False))
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return self._marks.mark(func(*args, **(kwargs | {"device": CPU})))
        return func(*args, **kwargs)

    def _move(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, *others = args
        if func == Tensor.cpu:
            return self._marks.moved(tensor, CPU)
        if func == Tensor.cuda:
            return self._marks.moved(tensor, GPU)
        device, dtype, *_ = torch._C._nn._parse_to(*others, **kwargs)
        tensor = self._marks.moved(tensor, device)
        return tensor if dtype is None else func(tensor, dtype)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Marks]:
    """While it lasts there is one GPU."""
    marks, generator = Marks(), torch.Generator()
    with (
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.cuda.current_stream"),
        mock.patch("torch.cuda.default_generators", (generator,)),
        mock.patch("torch.cuda.get_rng_state", side_effect=lambda _: generator.get_state()),
        mock.patch("torch.cuda.set_rng_state", side_effect=lambda s, _: generator.set_state(s)),
        _Operations(marks),
        _Calls(marks),
    ):
        yield marks
