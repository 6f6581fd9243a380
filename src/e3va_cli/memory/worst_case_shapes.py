"""Worst-case sizes of data-dependent operators, for steps on tensors without data.

How many proposals survive NMS, match or are sampled depends on values, which an estimated step does not have:

- operators whose result has a row per true entry (`nonzero`, indexing by a mask, NMS) return the maximum: all rows,
  or a smaller known bound. Bounds propagate through `|`, `cat`, comparisons and indexing from where they arise: a
  mask filled at 128 indices has at most 128 true entries;
- torchvision's classes that know a bound from their configuration set it: the sampler (at most
  `positive_fraction * batch_size_per_image` positives per image), the matcher (few best anchors per box), the level
  mapper (each RoI on one level), NMS (keeps all; the configured limit applies).

Any head of torchvision's classes or plain operators is covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper

from e3va_cli.memory.torch_private import TorchDispatchMode, is_mutable
from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, Matcher

aten = torch.ops.aten
COMPARISONS = (aten.gt.Scalar, aten.ge.Scalar)
# Operators whose result has at most as many positive entries as their first argument.
KEEPS = (aten.clone.default, aten._to_copy.default, aten.detach.default, aten.bitwise_and.Tensor, aten.index.Tensor)
# Operators that write into their first argument, with the maximum number of entries written.
FILLS: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    aten.index_fill_.int_Scalar: lambda args: args[2].numel(),
    aten.index_put_.default: lambda args: max(index.numel() for index in args[1] if index is not None),
}
BEST_ANCHORS = 4  # anchors with a box's best IoU; more only where anchors coincide


class WorstCaseShapes(TorchDispatchMode):
    """Return the largest possible results of operators with data-dependent sizes; for tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self._bounds = WeakTensorKeyDictionary()  # maximum number of true or positive entries of a tensor
        self._one_level = WeakTensorKeyDictionary()  # pyramid levels of RoIs
        self._limit: int | None = None

    def set_bound(self, tensor: Tensor, bound: int) -> Tensor:
        """Declare that at most `bound` entries of `tensor` are positive."""
        self._bounds[tensor] = min(bound, tensor.numel())
        return tensor

    def set_levels(self, levels: Tensor) -> Tensor:
        """Declare that each RoI has one level; all are put on the finest."""
        self._one_level[levels] = True
        return levels

    @contextmanager
    def max_entries(self, bound: int) -> Iterator[None]:
        """Limit all results in the block to `bound` entries."""
        self._limit = bound
        try:
            yield
        finally:
            self._limit = None

    def bound(self, tensor: Tensor) -> int:
        """Return the maximum number of positive entries of `tensor`."""
        bound = self._bounds.get(tensor, tensor.numel())
        return bound if self._limit is None else min(bound, self._limit)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return worst-case results of data-dependent operators; run any other and propagate bounds."""
        kwargs = kwargs or {}
        if func is aten.nonzero.default:
            return args[0].new_empty((self.bound(args[0]), args[0].ndim), dtype=torch.int64)
        if func is torch.ops.torchvision.nms.default:
            return args[0].new_empty(len(args[0]), dtype=torch.int64)
        if func is aten._local_scalar_dense.default:
            return 1 if not args[0].is_floating_point() else 1.0
        if func is aten.index.Tensor:
            args = (args[0], self._masks_to_indices(args[1]))
        result = func(*args, **kwargs)
        self._propagate(func, args, result)
        return result

    def _masks_to_indices(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Replace each mask by the positions of its true entries."""
        plain: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                count = self.bound(index)
                plain += [index.new_empty(count, dtype=torch.int64) for _ in range(index.ndim)]
            else:
                plain.append(index)
        return plain

    def _propagate(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Set the bound of a result if one of these rules applies."""
        of = self._bounds.get
        first = of(args[0]) if args and isinstance(args[0], Tensor) else None
        if func is aten.zeros_like.default:
            self.set_bound(result, 0)
        elif func is aten.eq.Scalar and args[0] in self._one_level:
            self.set_bound(result, args[0].numel() if args[1] == 0 else 0)
        elif func is aten.cat.default and all(t in self._bounds for t in args[0]):
            self.set_bound(result, sum(of(t, 0) for t in args[0]))
        elif first is not None:
            if func in FILLS:
                self.set_bound(result, first + FILLS[func](args))
            elif func is aten.bitwise_or.Tensor and of(args[1]) is not None:
                self.set_bound(result, first + of(args[1], 0))
            elif func in KEEPS or (func in COMPARISONS and args[1] >= 0):
                self.set_bound(result, first)
            elif is_mutable(func):
                del self._bounds[args[0]]


@contextmanager
def worst_case_shapes() -> Iterator[WorstCaseShapes]:
    """Within the block, run torchvision's detectors on tensors without data, at the largest configured sizes."""
    mode = WorstCaseShapes()
    sample: Callable[..., Any] = BalancedPositiveNegativeSampler.__call__
    match_best: Callable[..., Any] = Matcher.set_low_quality_matches_
    map_levels: Callable[..., Any] = LevelMapper.__call__

    def sample_bounded(sampler: Any, labels: list[Tensor]) -> Any:
        masks = sample(sampler, labels)
        for image_labels in labels:  # bounds labels that are indexed by the sampled masks
            mode.set_bound(image_labels, int(sampler.batch_size_per_image * sampler.positive_fraction))
        return masks

    def match_bounded(matcher: Any, matches: Tensor, all_matches: Tensor, quality: Tensor) -> None:
        with mode.max_entries(BEST_ANCHORS * len(quality)):
            match_best(matcher, matches, all_matches, quality)

    def map_to_one_level(mapper: Any, boxes: list[Tensor]) -> Tensor:
        return mode.set_levels(map_levels(mapper, boxes))

    def keep_all(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        return torch.argsort(scores, descending=True)

    with ExitStack() as undo:
        for owner, name, substitute in (
            (BalancedPositiveNegativeSampler, "__call__", sample_bounded),
            (Matcher, "set_low_quality_matches_", match_bounded),
            (LevelMapper, "__call__", map_to_one_level),
            (box_ops, "batched_nms", keep_all),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, substitute)
        undo.enter_context(mode)
        yield mode
