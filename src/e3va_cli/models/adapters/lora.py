"""LoRA: a low-rank update of the query and value projections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.errors import UserError
from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


class QueryValueUpdate(nn.Module):
    """`q += alpha/rank * x A_q B_q` and `v += alpha/rank * x A_v B_v`, added to a fused qkv projection by a hook.

    The hook leaves the backbone's modules and parameter names unchanged. A: width x rank, concatenated for q and v;
    B: rank x out (the width of q and v), zero-initialized.
    """

    def __init__(self, width: int, out: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(width, 2 * rank))
        self.B = nn.Parameter(torch.zeros(2, rank, out))
        self.scaling = alpha / rank
        bound = width**-0.5  # as nn.Linear and the authors' code
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the updates of q and v: (..., width) -> (..., out) each."""
        query, value = (x @ self.A).chunk(2, dim=-1)  # ..., rank
        return self.scaling * (query @ self.B[0]), self.scaling * (value @ self.B[1])

    def after(self, projection: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add the updates to the qkv projection's output, as its forward hook: (..., 3 out) -> (..., 3 out)."""
        query, key, value = output.chunk(3, dim=-1)
        query_update, value_update = self(inputs[0])
        return torch.cat((query + query_update, key, value + value_update), dim=-1)

    def after_part(self, part: int, projection: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add the update of q (part 0) or v (part 1) to a separate projection's output, as its hook: (..., out)."""
        return output + self.scaling * (inputs[0] @ self.A.chunk(2, dim=1)[part] @ self.B[part])


@dataclass
class LoRAOptions(AdapterOptions):
    """Options of LoRA."""

    rank: int = option(help="more adds parameters, and a little memory: 2 * rank numbers per token and block", gt=0)
    alpha: float = option(help="updates are scaled by alpha / rank; 1 is the default of the authors' code", gt=0)


@METHODS.register("lora", LoRAOptions)
class LoRA(FeatureExtractor):
    """LoRA on the query and value projections of every attention.

    Paper: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685 (ICLR 2022).

        W_q' = W_q + alpha/rank * (A_q B_q)^T, and W_v' likewise     A: C x rank, B: rank x C

    B is zero-initialized, so that training starts at the pre-trained features.

    Args:
        backbone: a backbone with query-key-value projections; it is frozen, and the backward pass runs through it.
        options: see `LoRAOptions`.

    Raises:
        UserError: the backbone has no attention with such projections.
    """

    def __init__(self, backbone: ResidualBackbone, options: LoRAOptions) -> None:
        super().__init__(backbone, options)
        backbone.requires_grad_(False)
        self.updates = nn.ModuleList()
        for branch in (branch for stage in backbone.stages for branch in stage.branches):
            if branch.qkv is not None:
                update = self._update(branch.qkv, branch.qkv.out_features // 3, options)
                branch.qkv.register_forward_hook(update.after)
            elif branch.query_value is not None:
                query, value = branch.query_value
                if query.out_features != value.out_features:
                    raise UserError(
                        "adapter=lora: queries and values of this backbone differ in width; use adapter=adapter"
                    )
                update = self._update(query, query.out_features, options)
                query.register_forward_hook(partial(update.after_part, 0))
                value.register_forward_hook(partial(update.after_part, 1))
        if not len(self.updates):
            raise UserError("adapter=lora: this backbone has no query-key-value projection; use adapter=adapter")

    def _update(self, projection: nn.Linear, out: int, options: LoRAOptions) -> QueryValueUpdate:
        update = QueryValueUpdate(projection.in_features, out, rank=options.rank, alpha=options.alpha)
        self.updates.append(update)
        return update
