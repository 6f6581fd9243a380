"""Follow the memory of a program storage by storage, op by op: on real CPU tensors or on fake ones without data.

Every operator that PyTorch dispatches passes through the tracker. A storage counts from the operator that made it
until its last tensor is gone, however many views share it. Each has a kind:

    weights, buffers, gradients, optimizer   told by `own`, and by hooks on what is trained
    batch                                    told by `own`: images and targets
    backbone, adapters, neck, head           activations: what autograd keeps, under the kind of the module keeping it
    transient                                everything else: results in passing, gradients of activations
    workspaces                               told by `Peak.with_kind`: what libraries hold beside all tensors

Not seen: memory that an operator takes and gives back inside itself (workspaces of convolutions), and what an
allocator holds beyond the tensors (fragmentation).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OWNED = ("weights", "buffers", "gradients", "optimizer", "batch")
ACTIVATIONS = ("backbone", "adapters", "neck", "head")
TRANSIENT = "transient"
WORKSPACES = "workspaces"
KINDS = (*OWNED, *ACTIVATIONS, TRANSIENT, WORKSPACES)
CUDA_GRANULARITY = 512  # bytes; CUDA's caching allocator rounds every tensor up to a multiple of it


@dataclass
class Peak:
    """The moment at which most memory was held.

    Attributes:
        total_bytes: at that moment.
        by_kind: bytes of each kind at that moment; they add up to the total.
        phase: forward, backward or optimizer.
        module: the module that was running, or whose backward was.
        operator: the operator whose result made it the peak.
    """

    total_bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    module: str = ""
    operator: str = ""

    def with_kind(self, kind: str, nbytes: int) -> Peak:
        """The same with `nbytes` more of a kind, held all the time."""
        held = {**self.by_kind, kind: self.by_kind.get(kind, 0) + nbytes}
        return replace(self, total_bytes=self.total_bytes + nbytes, by_kind=held)

    @property
    def place(self) -> str:
        """Phase and module, for people."""
        return f"{self.phase} of {self.module}" if self.module else f"{self.phase}, outside of any layer (losses)"


@dataclass
class _Storage:
    nbytes: int
    kind: str
    module_kind: str  # of the module that was running when it was made
    reference: weakref.ref[Any]


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all living storages while it is entered.

    Args:
        granularity: each storage counts as a multiple of so many bytes; 512 is what CUDA's allocator rounds to.

    Attributes:
        current_bytes: held now.
        by_kind: the same by kind.
        peak: the largest that `current_bytes` was since the last `restart`.
    """

    def __init__(self, *, granularity: int = CUDA_GRANULARITY) -> None:
        super().__init__()
        self.granularity = granularity
        self.current_bytes = 0
        self.by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.peak = Peak()
        self._storages: dict[int, _Storage] = {}
        self._phase = ""
        self._running: list[tuple[str, str]] = []  # name and kind of the modules whose forward runs, outermost first
        self._backward = ("", TRANSIENT)  # of the module whose backward runs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self.current_bytes > self.peak.total_bytes:
            module = self._where()[0]
            self.peak = Peak(self.current_bytes, dict(self.by_kind), self._phase, module, str(func))
        return result

    def own(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Count `tensors` as of `kind`, whether or not they were seen before."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor)
                self._mark(self._storages[tensor.untyped_storage()._cdata], kind)

    def restart(self) -> None:
        """Forget the peak; what is held stays counted."""
        self.peak = Peak(self.current_bytes, dict(self.by_kind), self._phase, self._where()[0])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the part of a step that the block is."""
        self._phase = name
        if name == "backward":  # what no saved tensor explains but outlived the forward pass
            for storage in self._storages.values():
                if storage.kind == TRANSIENT and storage.module_kind in ACTIVATIONS:
                    self._mark(storage, storage.module_kind)
        try:
            yield
        finally:
            self._phase, self._backward = "", ("", TRANSIENT)

    @contextmanager
    def follow(self, model: nn.Module, kind_of: Callable[[nn.Module], dict[nn.Module, str]]) -> Iterator[None]:
        """Count what `model` consists of, and tell by its modules what the storages of a step are for.

        Args:
            kind_of: the kind of activation, one of `ACTIVATIONS`, that each module of a model keeps.
        """
        kinds = kind_of(model)
        self.own(model.buffers(), "buffers")
        self.own(model.parameters(), "weights")
        self.own((p.grad for p in model.parameters()), "gradients")
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                where = (name or "(model)", kinds.get(module, TRANSIENT))
                for handle in (
                    module.register_forward_pre_hook(lambda *_, where=where: self._running.append(where)),
                    module.register_forward_hook(self._leave, always_call=True),
                ):
                    hooks.callback(handle.remove)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(lambda p: self.own((p.grad,), "gradients"))
                    hooks.callback(handle.remove)
            hooks.enter_context(saved_tensors_hooks(self._keep, self._use))
            yield

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _keep(self, tensor: Tensor) -> tuple[Tensor, tuple[str, str]]:
        """Autograd keeps `tensor` for the backward pass."""
        where = self._where()
        self._see(tensor)
        storage = self._storages[tensor.untyped_storage()._cdata]
        if storage.kind == TRANSIENT:
            self._mark(storage, where[1])
        return tensor, where

    def _use(self, kept: tuple[Tensor, tuple[str, str]]) -> Tensor:
        """The backward pass has come to the operator that kept the tensor."""
        tensor, self._backward = kept
        return tensor

    def _where(self) -> tuple[str, str]:
        return self._running[-1] if self._running else self._backward

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, self._rounded(storage.nbytes())
        known = self._storages.get(key)
        if known is None:
            kind_of_module = self._where()[1]
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._storages[key] = _Storage(nbytes, TRANSIENT, kind_of_module, reference)
            self._add(TRANSIENT, nbytes)
        elif known.nbytes != nbytes:  # resized in place
            self._add(known.kind, nbytes - known.nbytes)
            known.nbytes = nbytes

    def _forget(self, key: int) -> None:
        gone = self._storages.pop(key, None)
        if gone is not None:
            self._add(gone.kind, -gone.nbytes)

    def _mark(self, storage: _Storage, kind: str) -> None:
        self._add(storage.kind, -storage.nbytes)
        self._add(kind, storage.nbytes)
        storage.kind = kind

    def _add(self, kind: str, nbytes: int) -> None:
        self.by_kind[kind] += nbytes
        self.current_bytes += nbytes

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.granularity) * self.granularity
