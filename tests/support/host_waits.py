"""What would make the host wait for a GPU, if the tensors of a run on the CPU were there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten

# Their results, or the shapes of those, are known to the host only when the device has computed them.
_READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
# By name, since the CPU backend stands in for some of them.
_TO_HOST = ("cpu", "numpy", "tolist", "__array__")
_FROM_HOST = ("tensor", "as_tensor", "from_numpy")


class _Reads(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _READS or (packet is aten.index and any(_is_mask(index) for index in args[1])):
            self.found[f"{packet.__name__} in {_place()}"] += 1
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _TO_HOST or (name in _FROM_HOST and kwargs.get("device") is not None):
            self.found[f"{name} in {_place()}"] += 1
        elif name in ("to", "cuda") and not kwargs.get("non_blocking"):
            target = [*args[1:], *kwargs.values()]
            if name == "cuda" or any(isinstance(value, (str, torch.device)) for value in target):
                self.found[f"blocking {name} in {_place()}"] += 1
        return func(*args, **kwargs)


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _place() -> str:
    """The innermost function of this project or of megatron.core, unless the test itself is further in."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("cpu_backend.py"):  # stands between torch and whoever calls it
            frame = frame.f_back  # type: ignore[assignment]
            continue
        if "/megatron/core/" in name:
            return f"megatron.core {Path(name).name}:{frame.f_code.co_name}"
        if name.startswith(str(ROOT / "tests")) and name != __file__:
            break
        if name.startswith((str(ROOT / "helixpipe"), str(ROOT / "megatron"))):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the test"


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """How often each place would have made the host wait: reads of results, blocking copies."""
    found: Counter[str] = Counter()
    with _Reads(found), _Copies(found):
        yield found
