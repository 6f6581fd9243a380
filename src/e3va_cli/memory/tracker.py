"""Track the memory of a program storage by storage, op by op: real CPU tensors, or fake tensors without data.

The tracker sees every operator that PyTorch dispatches. A storage counts from the operator that allocates it until its
last tensor is deleted, once for all its views. Each storage has a category:

    weights, buffers, gradients, optimizer   set by `track`, by hooks on trainable parameters, and by the module that
                                             allocates them (`track_model`)
    batch                                    set by `track`: images and targets
    backbone, adapters, neck, head           activations saved for the backward pass, by the module that saves them
    transient                                everything else: temporaries, gradients of activations
    workspaces                               of libraries, during an operator, and set by `Peak.with_category`

`torch.distributed._tools.mem_tracker.MemTracker` (torch 2.15) is no replacement: it registers gradient hooks on frozen
parameters, which raises an error for every method but full fine-tuning, it has one category for all activations, and
rounds sizes only on a GPU. For full fine-tuning the peaks agree up to that rounding.

Not tracked: memory that an operator allocates and frees internally, except what `workspace` returns; fragmentation.
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

from e3va_cli.memory.torch_private import TorchDispatchMode, storage_id, tree_leaves

OWNED = ("weights", "buffers", "gradients", "optimizer", "batch")
ACTIVATIONS = ("backbone", "adapters", "neck", "head")
TRANSIENT = "transient"
WORKSPACES = "workspaces"
CATEGORIES = (*OWNED, *ACTIVATIONS, TRANSIENT, WORKSPACES)
WorkspaceFunction = Callable[[Any, tuple[Any, ...], Any], int]  # of an operator, its arguments and its result
CUDA_GRANULARITY = 512  # bytes; CUDA's caching allocator rounds up to a multiple of it


@dataclass
class Peak:
    """The moment of peak memory.

    Attributes:
        total_bytes: at that moment.
        by_category: bytes of each category at that moment; they sum to the total.
        phase: forward, backward or optimizer.
        module: the module whose forward or backward ran.
        operator: the operator that allocated the last storage.
    """

    total_bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    module: str = ""
    operator: str = ""

    def with_category(self, category: str, nbytes: int) -> Peak:
        """Return the peak with `nbytes` of a category added."""
        by_category = {**self.by_category, category: self.by_category.get(category, 0) + nbytes}
        return replace(self, total_bytes=self.total_bytes + nbytes, by_category=by_category)

    @property
    def location(self) -> str:
        """Return phase and module as text."""
        return f"{self.phase} of {self.module}" if self.module else f"{self.phase}, outside of all layers (losses)"


@dataclass
class _Storage:
    nbytes: int
    category: str
    module_category: str  # of the module whose forward or backward allocated it
    reference: weakref.ref[Any]


class StorageTracker(TorchDispatchMode):
    """Count the bytes of all live storages while it is entered.

    Args:
        granularity: sizes are rounded up to a multiple of this many bytes; 512 for CUDA's allocator.
        workspace: returns the bytes that an operator allocates and frees internally.

    Attributes:
        current_bytes: now.
        by_category: the same by category.
        peak: maximum of `current_bytes` since the last `reset_peak`.
    """

    def __init__(self, *, granularity: int = CUDA_GRANULARITY, workspace: WorkspaceFunction | None = None) -> None:
        super().__init__()
        self.granularity = granularity
        self.workspace = workspace
        self.current_bytes = 0
        self.by_category: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.peak = Peak()
        self._storages: dict[int, _Storage] = {}
        self._phase = ""
        self._running: list[tuple[str, str]] = []  # (name, category) of modules whose forward runs, outermost first
        self._backward = ("", TRANSIENT)  # of the module whose backward runs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        workspace = self.workspace(func, args, result) if self.workspace else 0
        if self.current_bytes + workspace > self.peak.total_bytes:
            now = Peak(self.current_bytes, dict(self.by_category), self._phase, self._where()[0], str(func))
            self.peak = now.with_category(WORKSPACES, workspace)
        return result

    def track(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Count `tensors` in `category`, whatever their category was."""
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor)
                self._set_category(self._storages[storage_id(tensor.untyped_storage())], category)

    def reset_peak(self) -> None:
        """Set the peak to the current memory."""
        self.peak = Peak(self.current_bytes, dict(self.by_category), self._phase, self._where()[0])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Label the block as a phase of a step."""
        self._phase = name
        if name == "backward":  # still alive, but not saved through autograd's hooks
            for storage in self._storages.values():
                if storage.category == TRANSIENT and storage.module_category in ACTIVATIONS:
                    self._set_category(storage, storage.module_category)
        try:
            yield
        finally:
            self._phase, self._backward = "", ("", TRANSIENT)

    @contextmanager
    def track_model(self, model: nn.Module, groups_of: Callable[[nn.Module], dict[nn.Module, str]]) -> Iterator[None]:
        """Count the tensors of `model`, and assign activations to its modules.

        Args:
            groups_of: returns each module's category of activations, one of `ACTIVATIONS`, or of all that it allocates,
                one of `OWNED`.
        """
        groups = groups_of(model)
        self.track(model.buffers(), "buffers")
        self.track(model.parameters(), "weights")
        self.track((p.grad for p in model.parameters()), "gradients")
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                where = (name or "(model)", groups.get(module, TRANSIENT))
                for handle in (
                    module.register_forward_pre_hook(lambda *_, where=where: self._running.append(where)),
                    module.register_forward_hook(self._pop, always_call=True),
                ):
                    hooks.callback(handle.remove)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(lambda p: self.track((p.grad,), "gradients"))
                    hooks.callback(handle.remove)
            hooks.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            yield

    def _pop(self, *_: Any) -> None:
        self._running.pop()

    def _pack(self, tensor: Tensor) -> tuple[Tensor, tuple[str, str]]:
        """Count a tensor that autograd saves for the backward pass."""
        where = self._where()
        self._count(tensor)
        storage = self._storages[storage_id(tensor.untyped_storage())]
        if storage.category == TRANSIENT:
            self._set_category(storage, where[1])
        return tensor, where

    def _unpack(self, saved: tuple[Tensor, tuple[str, str]]) -> Tensor:
        """Return a saved tensor; the backward pass has reached the operator that saved it."""
        tensor, self._backward = saved
        return tensor

    def _where(self) -> tuple[str, str]:
        return self._running[-1] if self._running else self._backward

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage_id(storage), self._rounded(storage.nbytes())
        known = self._storages.get(key)
        if known is None:
            allocated_by = self._where()[1]
            category = allocated_by if allocated_by in OWNED else TRANSIENT
            reference = weakref.ref(storage, lambda _: self._release(key))
            self._storages[key] = _Storage(nbytes, category, allocated_by, reference)
            self._add(category, nbytes)
        elif known.nbytes != nbytes:  # resized in place
            self._add(known.category, nbytes - known.nbytes)
            known.nbytes = nbytes

    def _release(self, key: int) -> None:
        gone = self._storages.pop(key, None)
        if gone is not None:
            self._add(gone.category, -gone.nbytes)

    def _set_category(self, storage: _Storage, category: str) -> None:
        self._add(storage.category, -storage.nbytes)
        self._add(category, storage.nbytes)
        storage.category = category

    def _add(self, category: str, nbytes: int) -> None:
        self.by_category[category] += nbytes
        self.current_bytes += nbytes

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.granularity) * self.granularity
