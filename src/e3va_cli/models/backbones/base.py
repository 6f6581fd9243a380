"""The interface of backbones to tuning methods: a stem, and stages of residual branches.

Every backbone that fits the highway is a residual network: a block adds one or two tensors to the stream,

    x = stem(images)
    for each stage:   x, branches = start(x)    x downsampled
        for each of the branches:   x = x + branch(x)

(attention and MLP in Swin). Tuning methods use these parts only, whatever the family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from e3va_cli.components.options import MAX_SEED, Condition, Options, option
from e3va_cli.components.registry import Registry
from e3va_cli.models.backbones.offload import BlockStreamer, HostWeights, OffloadedBlock
from e3va_cli.models.backbones.quantization import BITS, QuantizedLinear, is_quantizable

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")  # of an architecture; timm would download from other names
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOAD = ("none", "cpu", "disk")


@dataclass
class BackboneOptions(Options):
    """Options common to all backbone families; a checkpoint identifies its backbone by the weights' fingerprint."""

    fixed_args: ClassVar[frozenset[str]] = frozenset({"timm_name", "pretrained", "num_classes"})
    """Arguments of timm's constructor that are set by the family."""
    weightless_args: ClassVar[frozenset[str]] = frozenset({"drop_path_rate", "drop_rate"})
    """Arguments of timm's constructor without effect on the weights."""

    name: str = option(free=True)
    family: str = option("swin", free=True, help="family that builds timm_name", legacy_value="swin")
    timm_name: str = option(help="architecture in timm", free=True)
    model_args: dict[str, Any] = option({}, help="further arguments of timm's constructor", free=True)
    pretrained: bool = option(
        False, help="load published weights: timm's, downloaded, or those in the package for swin_nano", free=True
    )
    packaged_weights: str | None = option(
        None, help="name of weights in the package, which pretrained=true loads in place of timm's", free=True
    )
    weights: str | None = option(None, help="file with weights of timm, the authors or transformers", free=True)
    seed: int = option(
        0,
        help="seed of random weights, without pretrained and weights",
        ge=0,
        le=MAX_SEED,
        free=True,
        conditions=(
            Condition("pretrained", lambda value: not value, "whose weights are not random"),
            Condition("weights", lambda value: value is None, "whose weights are not random"),
        ),
    )
    drop_path_rate: float = option(
        0.1,
        help="stochastic depth; no effect with E3VA and frozen",
        ge=0,
        lt=1,
        legacy_value=0.1,
        free=True,
        training_only=True,
    )
    dtype: str = option(
        "float32",
        help="dtype of the weight matrices; 16, 8 or 4 bits reduce memory (E3VA and frozen only)",
        choices=(*DTYPES, *BITS),
        free=True,
    )
    offload: str = option(
        "none",
        help="cpu, disk: keep the weight matrices there, two blocks at a time on the GPU (E3VA and frozen only)",
        choices=OFFLOAD,
        free=True,
    )
    compile: bool = option(
        False, help="true: torch.compile, faster after a slow start (E3VA and frozen only)", free=True
    )

    @property
    def downloads(self) -> bool:
        """Return whether the weights are downloaded."""
        return self.pretrained and self.packaged_weights is None

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in names, weights and `model_args`."""
        for key in ("name", "timm_name", "packaged_weights"):
            if (name := getattr(self, key)) is not None and not NAME.fullmatch(name):
                yield f"{at}.{key}={name}: invalid architecture name"
        if self.pretrained and self.weights:
            yield f"{at}.pretrained=true and {at}.weights= are mutually exclusive; set one of them"
        if self.compile and self.offload != "none":
            yield f"{at}.compile=true and {at}.offload={self.offload} are mutually exclusive; set one of them"
        if self.downloads and (others := sorted(set(self.model_args) - self.weightless_args)):
            yield (
                f"{at}.pretrained=true: there are no published weights for {self.name} with "
                f"{', '.join(f'model_args.{name}' for name in others)}; remove them, or set {at}.weights=FILE"
            )
        for key, value in self.model_args.items():  # checkpoints contain them, and timm would open files that they name
            if key in self.fixed_args:
                yield f"{at}.model_args.{key}: cannot be set"
            numbers = value if isinstance(value, list | tuple) else [value]
            if not key.isidentifier() or not all(isinstance(number, int | float) for number in numbers):
                yield f"{at}.model_args.{key}: must be a number or a list of numbers"


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    Calling it maps the stream (B, H, W, C) to the tensor (B, H, W, C) that the block adds to it.

    Attributes:
        type: what the branch computes.
        block: the module that contains the branch.
        compute: the branch without drop path.
        drop_path: stochastic depth after the branch; the identity in eval mode.
        qkv: the fused query-key-value projection of an attention branch.
        query_value: its query and value projections, where they are separate.
        before_downsampling: whether `compute` reads the stream before the stage's downsampling, as the first attention
            of a stage of Hiera, which pools its queries; `Stage.start` then gives it that stream.
    """

    type: Literal["attention", "mlp"]
    block: nn.Module
    compute: Callable[[Tensor], Tensor]
    drop_path: Callable[[Tensor], Tensor]
    qkv: nn.Linear | None = None
    query_value: tuple[nn.Linear, nn.Linear] | None = None
    before_downsampling: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        offloaded: OffloadedBlock | None = getattr(self.block, "offloaded", None)
        with offloaded.on(x.device) if offloaded else nullcontext():
            return self.drop_path(self.compute(x))

    def add_to_(self, x: Tensor) -> Tensor:
        """Add the branch to the stream in place, and return what was added."""
        z = self(x)
        x.add_(z)
        return z


@dataclass(frozen=True)
class Stage:
    """Consecutive residual branches at one resolution and width."""

    width: int
    stride: int
    downsample: Callable[[Tensor], Tensor]  # from the stage before: B, H, W, C' -> B, ceil(H/2), ceil(W/2), C
    branches: tuple[Branch, ...]

    def start(self, x: Tensor) -> tuple[Tensor, tuple[Branch, ...]]:
        """Downsample the stream at the end of the stage before, and return the branches to be added in turn."""
        first, *others = self.branches
        if first.before_downsampling:
            before, compute = x, first.compute
            first = replace(first, compute=lambda _: compute(before))
        return self.downsample(x), (first, *others)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad images (B, 3, H, W) with zeros at the bottom and the right to sides that `multiple` divides."""
    height, width = images.shape[-2:]
    return pad(images, (0, -width % multiple, 0, -height % multiple))


class ResidualBackbone(nn.Module):
    """A pre-trained network as a stem and stages of residual branches; one subclass per backbone family.

    Attributes:
        model: the network, with its library's parameter names.
        mean, std: per-channel normalization of RGB images in 0..1.
        compiled: whether to `torch.compile` the branches where no gradients are taken.
        streamer: copies offloaded weights to the device.
    """

    model: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    compiled = False
    streamer: BlockStreamer | None

    def __init__(self) -> None:
        super().__init__()
        self.streamer = None
        self._unlisted_params = 0  # weights that are not elements of a parameter

    def stem(self, images: Tensor) -> Tensor:
        """Embed normalized images (B, 3, H, W) as the residual stream (B, H/stride, W/stride, C)."""
        raise NotImplementedError

    @property
    def stages(self) -> list[Stage]:
        """The stages, first to last."""
        raise NotImplementedError

    def patches(self, stream: Tensor) -> Tensor:
        """Return the stream as a map (B, H, W, C), without class and register tokens."""
        return stream

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file, in one of the family's published layouts, to timm's names."""
        return state

    def linears(self, block: nn.Module) -> dict[str, nn.Module]:
        """Return the linear layers of a block with nearly all of its weights, by name; those that options cast."""
        return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear | QuantizedLinear)}

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast the frozen weight matrices of the branches to `dtype`.

        The branches are then computed under autocast to it; the residual stream keeps its dtype.
        """
        for layer in self._all_linears():
            layer.weight.data = layer.weight.data.to(dtype)

    def quantize_weights(self, bits: int) -> None:
        """Quantize the frozen weight matrices of the branches to 8 or 4 bits."""
        count = self.num_params
        for block in self._blocks():
            for name, layer in self.linears(block).items():
                if isinstance(layer, nn.Linear) and name and is_quantizable(layer):
                    block.set_submodule(name, QuantizedLinear(layer, bits))
        self._unlisted_params += count - self.num_params

    def offload_weights(self, host: Callable[[Sequence[dict[str, Tensor]]], HostWeights]) -> None:
        """Keep the frozen weight matrices of the branches on the host; see `BlockStreamer`."""
        count = self.num_params
        stages = [[branch.block for branch in stage.branches] for stage in self.stages]
        self.streamer = BlockStreamer(stages, self.linears, host)
        self._unlisted_params += count - self.num_params

    @property
    def num_params(self) -> int:
        """The number of weights, of offloaded and quantized matrices too."""
        return sum(p.numel() for p in self.parameters()) + self._unlisted_params

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices to exclude from weight decay; vectors are always excluded."""
        return set()

    def _blocks(self) -> Iterator[nn.Module]:
        return iter(dict.fromkeys(branch.block for stage in self.stages for branch in stage.branches))

    def _all_linears(self) -> Iterator[Any]:
        return (layer for block in self._blocks() for layer in self.linears(block).values())

    @property
    def out_channels(self) -> list[int]:
        """The channels of each stage."""
        return [stage.width for stage in self.stages]

    @property
    def strides(self) -> list[int]:
        """The stride of each stage, in pixels of the image."""
        return [stage.stride for stage in self.stages]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the residual stream's patches at the end of each stage, (B, H_s, W_s, C_s)."""
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            x, branches = stage.start(x)
            for branch in branches:
                x = x + branch(x) if torch.is_grad_enabled() else x.add_(branch(x))
            outputs.append(self.patches(x))
        return outputs


BACKBONES: Registry[Callable[[Any, bool], ResidualBackbone]] = Registry("backbone")
"""Builders of each family, called with its options and whether to download timm's weights."""
