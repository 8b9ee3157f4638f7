"""Tensors of the pretend accelerator, and what is computed with them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tests.accelerator.backend import DEVICE, FAILED, HALVES, failures, random
from tests.accelerator.memory import Block, memory
from tests.accelerator.refusals import REFUSALS, refuse_dtype

CPU = torch.device("cpu")


class DeviceTensor(Tensor):
    """A tensor on the device: only metadata for PyTorch, the data are in a CPU tensor of the same layout."""

    _data: Tensor
    _block: Block

    # Operations come here as they are dispatched, below autograd, not as they are called.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, block: Block | None = None) -> DeviceTensor:
        refuse_dtype(data.dtype)
        block = block or memory.block(data)
        made = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
        )
        made._data, made._block = data, block
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = _operations.get(func) or _operations.setdefault(func, Operation(func))
        try:
            return func.decompose(*args, **kwargs or {}) if op.composite else op(*args, **kwargs or {})
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                # An error of a GPU keeps no operands alive: frames down here would.
                error.__traceback__ = None
                del args, kwargs
            if torch._C._current_graph_task_id() == -1:
                raise error
            failures.append(error)
            return FAILED

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self._data, self._block = value._data, value._block

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __repr__(self, **_: Any) -> str:
        return f"{self.detach().cpu()!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _leaf(self.detach().clone(), *self._leaf_state)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.detach().cpu(), *self._leaf_state)

    @property
    def _leaf_state(self) -> tuple[bool, bool]:
        return self.requires_grad, getattr(self, "_is_param", False)


def _leaf(tensor: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def _unpickled(data: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    return _leaf(data.to(DEVICE), requires_grad, is_parameter)


class Operation:
    """An operation of ATen on the device: what CUDA refuses is refused, the rest is done on the CPU."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.func = func
        name = schema.name.removeprefix("aten::")
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        """Whether it is made of others, which come by themselves."""
        self._has_device = any(argument.name == "device" for argument in schema.arguments)
        self._written = [
            (i, argument.name)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info and argument.alias_info.is_write
        ]
        self._random = torch.Tag.nondeterministic_seeded in func.tags
        self._crosses = name in ("copy_", "_to_copy")
        self._indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
        # What goes element by element takes a CPU tensor without dimensions as it takes a number.
        self._takes_numbers = torch.Tag.pointwise in func.tags or self._indexes or name in _TAKE_NUMBERS
        self._refuse = REFUSALS.get(name)
        self._wide = name in _WIDE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = _Tensors()
        args, kwargs = tensors.on_cpu(args), {name: tensors.on_cpu(value) for name, value in kwargs.items()}
        if tensors.cpu and not self._crosses:
            self._check_devices(tensors, args)
        if self._refuse:
            self._refuse(args)
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        stays = True
        if self._has_device:
            stays = kwargs.get("device") in (None, DEVICE, torch.device(DEVICE.type))
            kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        with random.drawn_from() if self._random else _NOTHING:
            output = self._compute(args, kwargs)
        return tensors.on_device(output) if stays else output

    def _check_devices(self, tensors: _Tensors, args: Any) -> None:
        cpu = tensors.cpu
        if self._indexes:
            # Indices may come from the CPU, what is put there may not.
            if tensors.first_on_device:
                cpu = [value for value in args[2:3] if any(value is each for each in cpu)]
            elif len(args) < 3:
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        written = [args[i] for i, _ in self._written if i < len(args)]
        if (
            any(each.dim() for each in cpu)
            or (cpu and not self._takes_numbers)
            or any(each is target for each in cpu for target in written)
        ):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
                f"(when checking arguments of {self.func.name()})"
            )

    def _compute(self, args: Any, kwargs: Any) -> Any:
        if not self._wide:
            try:
                return self.func(*args, **kwargs)
            except RuntimeError as error:
                if not any(f"not implemented for '{name}'" in str(error) for name in ("Half", "BFloat16")):
                    raise
        halves: list[Tensor] = []
        wide = [_widened(value, halves) for value in args]
        wide_kwargs = {name: _widened(value, halves) for name, value in kwargs.items()}
        output = self.func(*wide, **wide_kwargs)
        if not halves:
            return output
        for i, name in self._written:
            target, source = (args[i], wide[i]) if i < len(args) else (kwargs[name], wide_kwargs[name])
            if target is not source:
                output = target.copy_(source)
        return output if self._written else _narrowed(output, halves[0].dtype)


_operations: dict[Any, Operation] = {}
_NOTHING = contextlib.nullcontext()

# GPUs add up in float32, so does the CPU, but its own kernels for float16 are some 60 times slower than for float32.
_WIDE = {
    *("mm", "bmm", "mv", "dot", "addmm", "addmv", "addbmm", "baddbmm"),
    *("convolution", "convolution_backward"),
}
_TAKE_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_"}


class _Tensors:
    """The tensors among the arguments of an operation."""

    __slots__ = ("_outer", "cpu", "first_on_device")

    def __init__(self) -> None:
        self._outer: dict[int, Tensor] = {}
        """The arguments, by the identity of the CPU tensor that is computed with."""
        self.cpu: list[Tensor] = []
        self.first_on_device: bool | None = None

    def on_cpu(self, value: Any) -> Any:
        """`value` with the data of the device's tensors in their place."""
        kind = type(value)
        if kind is list or kind is tuple:
            return kind([self.on_cpu(each) for each in value])
        if not isinstance(value, Tensor):
            return value
        on_device = kind is DeviceTensor
        if self.first_on_device is None:
            self.first_on_device = on_device
        if not on_device:
            self.cpu.append(value)
        data = value._data if on_device else value
        self._outer[id(data)] = value
        return data

    def on_device(self, value: Any) -> Any:
        """A result with the device's tensors in the place of data."""
        kind = type(value)
        if kind is list or kind is tuple:
            return kind([self.on_device(each) for each in value])
        if not isinstance(value, Tensor):
            return value
        known = self._outer.get(id(value))
        if known is not None:
            if known.shape != value.shape or known.stride() != value.stride():
                known.data = DeviceTensor(value)
            return known
        block = memory.find(value)
        if block is not None:
            # A view is an inference tensor exactly if what it is a view of is one.
            for outer in self._outer.values():
                if (
                    getattr(outer, "_block", None) is block
                    and outer.is_inference() != torch.is_inference_mode_enabled()
                ):
                    with torch.inference_mode(outer.is_inference()):
                        return DeviceTensor(value, block)
        return DeviceTensor(value, block)


def _widened(value: Any, halves: list[Tensor]) -> Any:
    if isinstance(value, Tensor) and value.dtype in HALVES:
        halves.append(value)
        return value.float()
    return type(value)([_widened(each, halves) for each in value]) if isinstance(value, (list, tuple)) else value


def _narrowed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.to(dtype)
    return type(value)([_narrowed(each, dtype) for each in value]) if isinstance(value, (list, tuple)) else value
