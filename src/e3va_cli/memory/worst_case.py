"""The data-dependent parts of a detector with the largest sizes that its configuration allows, for steps without data.

How many proposals survive, match or are sampled depends on values, and a planned step has none. Two things stand in:

- an operator whose result has as many rows as there are true entries (`nonzero`, indexing by a mask, NMS) gets the
  largest number possible: all of them, unless a smaller bound is known. Bounds are followed from where they arise
  (a mask filled at 128 indices has at most 128 true entries) through `|`, `cat`, comparisons and indexing;
- torchvision's callables that know a bound from the configuration say so: the sampler (at most
  `positive_fraction * batch_size_per_image` positives an image), the matcher (each instance has few best anchors), the
  pyramid's level mapper (each region lies on one level), NMS (keeps all, so the configured limit decides).

Nothing here belongs to one head: a head made of torchvision's parts, or of plain operators, needs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper

from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, Matcher

aten = torch.ops.aten
COMPARISONS = (aten.gt.Scalar, aten.ge.Scalar)
# Operators whose result has no more positive entries than their first argument.
KEEPS = (aten.clone.default, aten._to_copy.default, aten.detach.default, aten.bitwise_and.Tensor, aten.index.Tensor)
# Operators that write into their first argument, and how many entries at most.
FILLS: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    aten.index_fill_.int_Scalar: lambda args: args[2].numel(),
    aten.index_put_.default: lambda args: max(index.numel() for index in args[1] if index is not None),
}
BEST_ANCHORS = 4  # anchors that share an instance's best overlap; more only where anchors coincide


class WorstCase(TorchDispatchMode):
    """Gives operators with data-dependent sizes the largest ones possible. For tensors without data only."""

    def __init__(self) -> None:
        super().__init__()
        self._bounds = WeakTensorKeyDictionary()  # at most so many entries of the tensor are true, or positive
        self._one_level = WeakTensorKeyDictionary()  # regions' pyramid levels
        self._limit: int | None = None

    def note(self, tensor: Tensor, bound: int) -> Tensor:
        """Say that at most `bound` entries of `tensor` are positive."""
        self._bounds[tensor] = min(bound, tensor.numel())
        return tensor

    def note_levels(self, levels: Tensor) -> Tensor:
        """Say that `levels` shares things out: what is on one level is on no other. All are put on the finest."""
        self._one_level[levels] = True
        return levels

    @contextmanager
    def at_most(self, bound: int) -> Iterator[None]:
        """Say that nothing in the block finds more than `bound` entries."""
        self._limit = bound
        try:
            yield
        finally:
            self._limit = None

    def bound(self, tensor: Tensor) -> int:
        """The largest number of positive entries that `tensor` can have."""
        bound = self._bounds.get(tensor, tensor.numel())
        return bound if self._limit is None else min(bound, self._limit)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what depends on values; run the rest and see what it means for the bounds."""
        kwargs = kwargs or {}
        if func is aten.nonzero.default:
            return args[0].new_empty((self.bound(args[0]), args[0].ndim), dtype=torch.int64)
        if func is torch.ops.torchvision.nms.default:
            return args[0].new_empty(len(args[0]), dtype=torch.int64)
        if func is aten._local_scalar_dense.default:
            return 1 if not args[0].is_floating_point() else 1.0
        if func is aten.index.Tensor:
            args = (args[0], self._without_masks(args[1]))
        result = func(*args, **kwargs)
        self._follow(func, args, result)
        return result

    def _without_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Masks among `indices` as the positions of their true entries."""
        plain: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                count = self.bound(index)
                plain += [index.new_empty(count, dtype=torch.int64) for _ in range(index.ndim)]
            else:
                plain.append(index)
        return plain

    def _follow(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """What is known of the bound of a result; nothing, unless one of these rules says so."""
        of = self._bounds.get
        first = of(args[0]) if args and isinstance(args[0], Tensor) else None
        if func is aten.zeros_like.default:
            self.note(result, 0)
        elif func is aten.eq.Scalar and args[0] in self._one_level:
            self.note(result, args[0].numel() if args[1] == 0 else 0)
        elif func is aten.cat.default and all(t in self._bounds for t in args[0]):
            self.note(result, sum(of(t, 0) for t in args[0]))
        elif first is not None:
            if func in FILLS:
                self.note(result, first + FILLS[func](args))
            elif func is aten.bitwise_or.Tensor and of(args[1]) is not None:
                self.note(result, first + of(args[1], 0))
            elif func in KEEPS or (func in COMPARISONS and args[1] >= 0):
                self.note(result, first)
            elif func._schema.is_mutable:
                del self._bounds[args[0]]


@contextmanager
def worst_case() -> Iterator[WorstCase]:
    """Within the block, torchvision's detectors run on tensors without data, at the largest sizes configured."""
    mode = WorstCase()
    sample: Callable[..., Any] = BalancedPositiveNegativeSampler.__call__
    match_best: Callable[..., Any] = Matcher.set_low_quality_matches_
    map_levels: Callable[..., Any] = LevelMapper.__call__

    def sampled(sampler: Any, labels: list[Tensor]) -> Any:
        masks = sample(sampler, labels)
        for of_image in labels:  # whatever is later taken from them by what was sampled
            mode.note(of_image, int(sampler.batch_size_per_image * sampler.positive_fraction))
        return masks

    def best_matched(matcher: Any, matches: Tensor, all_matches: Tensor, quality: Tensor) -> None:
        with mode.at_most(BEST_ANCHORS * len(quality)):
            match_best(matcher, matches, all_matches, quality)

    def levelled(mapper: Any, boxes: list[Tensor]) -> Tensor:
        return mode.note_levels(map_levels(mapper, boxes))

    def all_kept(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        return torch.argsort(scores, descending=True)

    with ExitStack() as undo:
        for owner, name, substitute in (
            (BalancedPositiveNegativeSampler, "__call__", sampled),
            (Matcher, "set_low_quality_matches_", best_matched),
            (LevelMapper, "__call__", levelled),
            (box_ops, "batched_nms", all_kept),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, substitute)
        undo.enter_context(mode)
        yield mode
