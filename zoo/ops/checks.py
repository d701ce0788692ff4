"""What is asked of inputs: those that do not agree are refused where they enter, by name and with both sizes."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

FLAGS = ("mask", "starts", "real", "refresh", "reset")
"""Names of inputs that say yes or no; all others are numbers."""


def check_shapes(op: str, shapes: dict[str, str], **tensors: Tensor | None) -> dict[str, int]:
    """Compare tensors with the shapes an op wants.

    Args:
        op: name of the op, for the message.
        shapes: by name of an input, its letters, as `{"q": "b t h d", "state": "b h d e"}`. The first input that has a
            letter says what it stands for.
        tensors: the inputs; None where an optional one is absent.

    Returns:
        The size of each letter.

    Raises:
        ValueError: naming the input, what it should be and what it is; or if the tensors are on several devices, or
            there is no token.
    """
    check_devices(op, tensors.values())
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        x = tensors[name]
        if x is None:
            continue
        letters = letters.split()
        if x.dim() != len(letters):
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, wanted ({' '.join(letters)})")
        for letter, size in zip(letters, x.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
                raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, wanted ({' '.join(letters)}) = ({wanted})")
    if sizes.get("t") == 0:
        raise ValueError(f"{op}: a sequence of no tokens")
    return sizes


def check_devices(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise ValueError where tensors are on several devices, naming two of them."""
    devices = list(dict.fromkeys(x.device for x in tensors if x is not None))
    if len(devices) > 1:
        raise ValueError(f"{op} wants its inputs on one device, got {devices[0]} and {devices[1]}")


def check_dtypes(op: str, takes_complex: bool = False, **tensors: Tensor) -> None:
    """Raise ValueError on flags that are not of bool and on numbers that are not floating (or complex, if taken)."""
    for name, x in tensors.items():
        if name in FLAGS:
            if x.dtype != torch.bool:
                raise ValueError(f"{op}: {name} is {x.dtype}, wanted torch.bool")
        elif not (x.is_floating_point() or (takes_complex and x.is_complex())):
            raise ValueError(f"{op}: {name} is {x.dtype}, wanted a floating{' or complex' * takes_complex} dtype")


def is_plain_call(tensors: Iterable[Tensor]) -> bool:
    """Whether a call is of plain tensors and runs at once: no compiler, tracer, transform or subclass looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or any(type(x) not in _PLAIN_TYPES for x in tensors)
    )


def is_plain_cpu_call(tensors: Iterable[Tensor | None], *dtypes: torch.dtype) -> bool:
    """Whether a call is plain, its numbers lie on a CPU in one of the dtypes, and nothing but autograd looks on."""
    present = [x for x in tensors if x is not None]
    return (
        all(x.dtype in dtypes and x.is_cpu for x in present)
        and is_plain_call(present)
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def has_values(x: Tensor) -> bool:
    """Whether there are numbers to look at: no compiler asks, and the tensor is more than a shape."""
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))


def once_per_look(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check that is asked once about all inputs that look alike: tensors of a shape, dtype and device, options.

    In decoding, where every token's inputs look like the last one's, checks would be most of what a token costs. Calls
    that a compiler or a transform looks at, whose shapes need not be numbers, are checked each time.
    """
    found: dict[tuple, Any] = {}

    @functools.wraps(check)
    def checked(*inputs: Any) -> Any:
        if not is_plain_call(x for x in inputs if isinstance(x, Tensor)):
            return check(*inputs)
        look = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in inputs)
        if look not in found:
            if len(found) == _MOST_LOOKS:
                found.clear()
            found[look] = check(*inputs)
        return found[look]

    return checked


_MOST_LOOKS = 1000  # sequences may come in any length
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
