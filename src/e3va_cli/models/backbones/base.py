"""What a tuning method sees of a backbone: a stem, and stages of residual branches.

Every backbone that fits the highway is a residual network: a block adds one or two tensors to the stream,

    x = stem(images)
    for each stage:   x = downsample(x)
        for each branch of it:   x = x + branch(x)

(attention and MLP in Swin). Tuning methods read or change these parts and know nothing of what is inside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from e3va_cli.components.options import MAX_SEED, Options, Under, option
from e3va_cli.components.registry import Registry

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")  # of an architecture; timm takes others for places to fetch from
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BackboneOptions(Options):
    """Options of a frozen network and its weights, of every family; the weights' fingerprint tells which it is."""

    name: str = option(free=True)
    family: str = option("swin", free=True, help="whose code reads timm_name and model_args", before="swin")
    timm_name: str = option(help="of the architecture", free=True)
    model_args: dict[str, Any] = option({}, help="further ones of timm's constructor", free=True)
    pretrained: bool = option(False, help="fetch timm's weights", free=True)
    weights: str | None = option(None, help="or read them from a file: timm's, or the authors' .pth", free=True)
    seed: int = option(
        0,
        help="of random weights, where neither is given",
        least=0,
        most=MAX_SEED,
        free=True,
        under=(
            Under("pretrained", lambda value: not value, "whose weights are not random"),
            Under("weights", lambda value: value is None, "whose weights are not random"),
        ),
    )
    drop_path_rate: float = option(
        0.1,
        help="of methods with gradients through the backbone; without effect with E3VA and frozen",
        least=0,
        below=1,
        before=0.1,
        free=True,
        of_training=True,
    )
    dtype: str = option(
        "float32",
        help="of the weight matrices; bfloat16 or float16 reduces memory, with E3VA or frozen",
        choices=tuple(DTYPES),
        free=True,
    )
    compile: bool = option(
        False, help="true: compiled by torch.compile, faster after a slow start, with E3VA or frozen", free=True
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with names and weights."""
        for key in ("name", "timm_name"):
            if (name := getattr(self, key)) is not None and not NAME.fullmatch(name):
                yield f"{at}.{key}={name}: not the name of an architecture"
        if self.pretrained and self.weights:
            yield f"{at}.pretrained=true and {at}.weights= exclude each other: give one of them"


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block, whose result the block adds to its residual stream.

    Calling it maps the stream `x` (B, H, W, C) to the tensor to be added (B, H, W, C).

    Attributes:
        type: what the branch computes.
        block: the module that the branch is a part of.
        compute: the branch without its drop path.
        drop_path: stochastic depth at the branch's end; the identity in eval mode.
        qkv: the fused query-key-value projection of an attention branch.
        query_value: its query and value projections, where they are separate.
    """

    type: Literal["attention", "mlp"]
    block: nn.Module
    compute: Callable[[Tensor], Tensor]
    drop_path: Callable[[Tensor], Tensor]
    qkv: nn.Linear | None = None
    query_value: tuple[nn.Linear, nn.Linear] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.drop_path(self.compute(x))


@dataclass(frozen=True)
class Stage:
    """A run of residual branches at one resolution and width."""

    width: int
    stride: int
    downsample: Callable[[Tensor], Tensor]  # from the stage before: B, H, W, C' -> B, ceil(H/2), ceil(W/2), C
    branches: tuple[Branch, ...]


class ResidualBackbone(nn.Module):
    """A pre-trained network as a stem and stages of residual branches. One subclass per family of backbones.

    Attributes:
        model: the network with its weights, under its library's own names.
        mean, std: per-channel normalisation of RGB images in 0..1 that the weights were trained with.
        compiled: compute the branches by `torch.compile`, where nothing is kept for a backward pass.
    """

    model: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    compiled = False

    def stem(self, images: Tensor) -> Tensor:
        """Embed normalised images (B, 3, H, W) as the residual stream (B, H/stride, W/stride, C)."""
        raise NotImplementedError

    @property
    def stages(self) -> list[Stage]:
        """The stages, first to last."""
        raise NotImplementedError

    def patches(self, stream: Tensor) -> Tensor:
        """The map that features are made of, (B, H, W, C): the stream without tokens that are no part of the image."""
        return stream

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file, in one of the family's layouts, as timm does."""
        return state

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Keep the weight matrices of the branches, frozen, in fewer bits, and compute the branches in them."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not to be decayed when a method trains them, beside all vectors."""
        return set()

    @property
    def out_channels(self) -> list[int]:
        """Channels of each stage."""
        return [stage.width for stage in self.stages]

    @property
    def strides(self) -> list[int]:
        """Pixels of the image from one place of each stage's map to the next."""
        return [stage.stride for stage in self.stages]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The residual stream's patches at the end of each stage, (B, H_s, W_s, C_s)."""
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            x = stage.downsample(x)
            for branch in stage.branches:
                x = x + branch(x) if torch.is_grad_enabled() else x.add_(branch(x))
            outputs.append(self.patches(x))
        return outputs


BACKBONES: Registry[Callable[[Any, bool], ResidualBackbone]] = Registry("backbone")
"""What builds a backbone of each family, of its options and whether to fetch timm's weights."""
