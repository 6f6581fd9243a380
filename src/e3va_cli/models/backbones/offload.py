"""Keep the weight matrices of a frozen backbone outside of the device, and stream them to it block by block.

    device, computing:   block 0 | block 1 | block 2 | ...
    copying to it:       block 1 | block 2 | block 3 | ...       on another CUDA stream

Two slots of device memory hold the block that computes and the next one. They are freed at the end of a pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.files import atomic_write

ALIGNMENT = 512  # bytes, of tensors in a slot


class HostWeights(Protocol):
    """Where weights are while they are not on the device."""

    def copy_to(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Copy the weights of a block to `tensors`; asynchronously on a GPU, where the host's memory allows it."""
        ...


class PinnedWeights:
    """Weights in the host's memory, page-locked from their first copy to a GPU on.

    Args:
        blocks: the tensors of each block, on the CPU or the meta device.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        self.blocks = [list(tensors) for tensors in blocks]

    def copy_to(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Copy the weights of a block; nothing in estimates, whose weights have no data."""
        hosted = self.blocks[block]
        for index, target in enumerate(tensors):
            if hosted[index].is_meta:
                continue
            if target.is_cuda and not hosted[index].is_pinned():
                hosted[index] = hosted[index].pin_memory()
            target.copy_(hosted[index], non_blocking=True)


class MappedWeights:
    """Weights in a safetensors file, which is mapped into memory for the duration of a copy only.

    Args:
        path: of the file.
        keys: names of the tensors of each block.
    """

    def __init__(self, path: Path, keys: Sequence[Sequence[str]]) -> None:
        self.path, self.keys = path, keys

    def copy_to(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Copy the weights of a block.

        Raises:
            UserError: the file was deleted or damaged.
        """
        try:
            with safe_open(self.path, "pt") as file:
                for key, target in zip(self.keys[block], tensors, strict=True):
                    target.copy_(file.get_tensor(key), non_blocking=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"backbone.offload=disk: {self.path} was deleted or changed while in use ({first_line(error)}); "
                "start again, and it is written anew"
            ) from None


class BlockStreamer(nn.Module):
    """Hold the weights of the block that computes, and of the next one, on the device.

    Backward passes that recompute run the stages in reverse order, each from its first block.

    Args:
        stages: the block of each branch, by stage, in the order of computation.
        layers_of: returns the layers of a block whose weights are offloaded, and are no parameters any more, by name.
        host: builds the `HostWeights` of the tensors of each block, named by unique keys.

    Attributes:
        offloaded_bytes: of all blocks.
        streamed_bytes: copied to the device so far.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[nn.Module]],
        layers_of: Callable[[nn.Module], Mapping[str, nn.Module]],
        host: Callable[[Sequence[dict[str, Tensor]]], HostWeights],
    ) -> None:
        super().__init__()
        self._blocks: list[_Block] = []
        self._stages: list[range] = []  # the blocks of each stage
        hosted: list[dict[str, Tensor]] = []
        for stage in stages:
            start = len(self._blocks)
            for block in dict.fromkeys(stage):
                index = len(self._blocks)
                tensors, offloaded = _offload(layers_of(block), f"blocks.{index}")
                hosted.append(tensors)
                self._blocks.append(_Block(len(self._stages), stage.count(block), offloaded))
                block.offloaded = OffloadedBlock(self, index)  # type: ignore[assignment]
            self._stages.append(range(start, len(self._blocks)))
        self._host = host(hosted)
        self.offloaded_bytes = sum(block.nbytes for block in self._blocks)
        self.streamed_bytes = 0
        self._backward = False  # whether stages run in reverse order
        self._stage: int | None = None  # that ran last
        self._slots: _Slots | None = None

    def forward(self, device: torch.device) -> list[Tensor]:
        """Allocate both slots; a module's call, so that memory estimates see whose memory it is."""
        size = max(block.slot_bytes for block in self._blocks)
        return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]

    @contextmanager
    def use(self, index: int, device: torch.device) -> Iterator[None]:
        """Enter with the weights of a block on the device; after its branch is launched, copy those of the next."""
        with torch.inference_mode(False), torch.no_grad():
            slots = self._enter(index, device)
        yield
        slots.branches += 1
        following = self._following(index)
        with torch.inference_mode(False), torch.no_grad():
            if following is not None:
                self._load(slots, following)
            elif slots.branches == self._blocks[index].branches:
                self._leave(slots)
                slots.wait_for_copies()
                self._slots = None

    def _enter(self, index: int, device: torch.device) -> _Slots:
        """Set the attributes of a block's layers to its weights on the device."""
        slots = self._slots
        if slots is None or slots.device != device:
            slots = self._slots = _Slots(self(device))
        if slots.current == index:
            return slots
        stage = self._blocks[index].stage
        if index == self._stages[stage].start:
            repeats_last = self._stage == stage == len(self._stages) - 1
            self._backward = repeats_last or (self._backward and self._stage == stage + 1)
            self._stage = stage
        self._leave(slots)
        self._load(slots, index)
        slots.enter(index)
        for tensor, value in zip(self._blocks[index].tensors, self._views(slots, index), strict=True):
            setattr(tensor.layer, tensor.name, value)
        return slots

    def _leave(self, slots: _Slots) -> None:
        """Remove the weights of the current block from its layers."""
        if slots.current is not None:
            for tensor in self._blocks[slots.current].tensors:
                setattr(tensor.layer, tensor.name, tensor.placeholder)
        slots.leave()

    def _load(self, slots: _Slots, index: int) -> None:
        """Start to copy a block into the slot that the current one does not use, unless it is there."""
        if index in slots.loaded:
            return
        with slots.copying_to(index):
            self._host.copy_to(index, self._views(slots, index))
        self.streamed_bytes += self._blocks[index].nbytes

    def _views(self, slots: _Slots, index: int) -> list[Tensor]:
        """Return the memory of a block's tensors in its slot."""
        memory = slots.memory[slots.loaded.index(index)]
        return [tensor.view(memory) for tensor in self._blocks[index].tensors]

    def _following(self, index: int) -> int | None:
        """Return the block that runs after another; None at the end of a pass."""
        stage = self._blocks[index].stage
        if index + 1 in self._stages[stage]:
            return index + 1
        following = stage - 1 if self._backward else stage + 1
        return self._stages[following].start if 0 <= following < len(self._stages) else None


@dataclass(frozen=True)
class OffloadedBlock:
    """A block of a streamer; an attribute of the block's module."""

    streamer: BlockStreamer
    index: int

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Return a context in which the block's weights are on the device."""
        return self.streamer.use(self.index, device)


@dataclass(frozen=True)
class _OffloadedTensor:
    """A weight of a layer.

    Attributes:
        layer, name: whose attribute it is.
        placeholder: a meta tensor, the attribute's value while the block is not on the device.
        offset: of its bytes in a slot.
    """

    layer: nn.Module
    name: str
    placeholder: Tensor
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.placeholder.nbytes

    def view(self, memory: Tensor) -> Tensor:
        """Return its bytes of a slot as a tensor."""
        return memory[self.offset : self.end].view(self.placeholder.dtype).view(self.placeholder.shape)


@dataclass(frozen=True)
class _Block:
    """A block: its stage, its number of branches, and its offloaded tensors."""

    stage: int
    branches: int
    tensors: list[_OffloadedTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.placeholder.nbytes for tensor in self.tensors)

    @property
    def slot_bytes(self) -> int:
        return max((tensor.end for tensor in self.tensors), default=0)


class _Slots:
    """Two slots of memory on a device during one pass, and the order of what uses them.

    Attributes:
        loaded: the block in each slot, or on its way to it.
        current: the block that computes.
        branches: of it, that were launched.
    """

    def __init__(self, memory: list[Tensor]) -> None:
        self.memory = memory
        self.device = memory[0].device
        self.loaded: list[int | None] = [None, None]
        self.current: int | None = None
        self.branches = 0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._left: torch.cuda.Event | None = None  # when the block before the current one has computed

    def leave(self) -> None:
        """Let copies overwrite the slot of the current block when all that is launched so far has run."""
        self.current = None
        if self._stream is not None:
            self._left = torch.cuda.current_stream(self.device).record_event()

    def enter(self, index: int) -> None:
        """Let the device compute with a block when it is copied."""
        self.current, self.branches = index, 0
        copied = self._copied[self.loaded.index(index)]
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    @contextmanager
    def copying_to(self, index: int) -> Iterator[None]:
        """Choose the slot of a block; copies inside the context run on the stream for copies."""
        slot = 1 - self.loaded.index(self.current) if self.current is not None else 0
        self.loaded[slot] = index
        if self._stream is None:
            yield
            return
        assert self._left is not None
        self._stream.wait_event(self._left)
        with torch.cuda.stream(self._stream):
            yield
            self._copied[slot] = self._stream.record_event()

    def wait_for_copies(self) -> None:
        """Let the device free the memory when it is not copied to any more."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


def _offload(layers: Mapping[str, nn.Module], key: str) -> tuple[dict[str, Tensor], list[_OffloadedTensor]]:
    """Replace the weights of layers, without biases, by placeholders; return them by key, and their layout."""
    hosted: dict[str, Tensor] = {}
    offloaded: list[_OffloadedTensor] = []
    offset = 0
    for layer_name, layer in layers.items():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name == "bias":
                continue
            value = parameter.detach()
            tensor = _OffloadedTensor(layer, name, value.to("meta"), offset)
            delattr(layer, name)
            setattr(layer, name, tensor.placeholder)
            hosted[".".join(filter(None, (key, layer_name, name)))] = (
                value if value.is_meta else value.cpu().contiguous()
            )
            offloaded.append(tensor)
            offset = -(-tensor.end // ALIGNMENT) * ALIGNMENT
    return hosted, offloaded


def host_weights(blocks: Sequence[dict[str, Tensor]]) -> HostWeights:
    """Keep the tensors of all blocks in the host's memory."""
    return PinnedWeights([list(block.values()) for block in blocks])


def map_weights(blocks: Sequence[dict[str, Tensor]], path: Path) -> HostWeights:
    """Write the tensors of all blocks to a safetensors file, unless it exists already.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {key: tensor for block in blocks for key, tensor in block.items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        return host_weights(blocks)
    if not _contains(path, tensors):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError, UserError) as error:
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            raise UserError(
                f"backbone.offload=disk: cannot write {nbytes / 2**30:.1f} GiB of weights to {path} "
                f"({first_line(error)}); set the environment variable XDG_CACHE_HOME to a folder with free space"
            ) from None
    return MappedWeights(path, [list(block) for block in blocks])


def _contains(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file has tensors of these names, dtypes and shapes."""
    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return parts.keys() == tensors.keys() and all(
                parts[key].get_shape() == list(tensor.shape) and parts[key][:0].dtype == tensor.dtype
                for key, tensor in tensors.items()
            )
    except (OSError, SafetensorError):
        return False


def cache_path(name: str) -> Path:
    """Return the path of a file of weights in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "e3va" / "weights" / f"{name}.safetensors"
