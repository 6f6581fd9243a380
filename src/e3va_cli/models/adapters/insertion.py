"""Trainable modules inside a frozen backbone: the base of Adapter, LoRand, AdaptFormer and Mona.

They differ in the module M and in how it is inserted at a branch of the stream x; the three variants are below. The
backbone's weights are frozen, but the backward pass runs through its branches, whose activations are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from e3va_cli.models.adapters.base import FeatureExtractor
from e3va_cli.models.backbones.base import Branch, ResidualBackbone

InsertFn = Callable[[Tensor, Branch, nn.Module], Tensor]  # from the stream before a branch to the stream after it


def after_branch(x: Tensor, branch: Branch, module: nn.Module) -> Tensor:
    """`x + drop_path(M(compute(x)))`."""
    return x + branch.drop_path(module(branch.compute(x)))


def beside_branch(x: Tensor, branch: Branch, module: nn.Module) -> Tensor:
    """`x + drop_path(compute(x)) + M(x)`."""
    return x + branch(x) + module(x)


def after_addition(
    x: Tensor, branch: Branch, module: nn.Module, patches: Callable[[Tensor], Tensor] = lambda stream: stream
) -> Tensor:
    """`M(x + drop_path(compute(x)))`, with M applied to the stream's `patches` only."""
    x = x + branch(x)
    grid = patches(x)
    return module(x) if grid is x else torch.cat((x[:, : -grid.shape[1]], module(grid)), dim=1)


class InsertedAdapters(FeatureExtractor):
    """A frozen backbone, with drop path, and one trainable module per residual branch.

    Args:
        backbone: any residual backbone; its parameters are frozen.
        build: builds the module for a stream of the given width.
        insert: computes the stream after a branch with its module.
        branch_types: the branches that get a module.
    """

    def __init__(
        self,
        backbone: ResidualBackbone,
        build: Callable[[int], nn.Module],
        insert: InsertFn,
        branch_types: Collection[str] = ("attention", "mlp"),
    ) -> None:
        super().__init__(backbone)
        backbone.requires_grad_(False)
        self.insert, self.branch_types = insert, branch_types
        self.inserted = nn.ModuleList(
            build(stage.width) for stage in backbone.stages for branch in stage.branches if branch.type in branch_types
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one feature map (B, C_s, H_s, W_s) per stage in `out_indices`."""
        x = self.backbone.stem(images)
        outputs = []
        modules = iter(self.inserted)
        for index, stage in enumerate(self.backbone.stages):
            x, branches = stage.start(x)
            for branch in branches:
                x = self.insert(x, branch, next(modules)) if branch.type in self.branch_types else x + branch(x)
            if index in self.out_indices:
                outputs.append(self.output(index, self.backbone.patches(x)))
        return outputs
