"""Swin Transformer (arXiv 2103.14030) from timm, at any image size, as residual branches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage
from e3va_cli.models.backbones.window_attention import (
    chunked_mlp,
    chunked_window_attention,
    pad_to_windows,
    shift_attn_mask,
)
from e3va_cli.utils.amp import autocast_dtype

STAGES = 4  # of strides 4 to 32
FIXED = frozenset(
    {"timm_name", "pretrained", "num_classes", "strict_img_size", "always_partition", "pad_before_shift"}
)  # not in model_args
WEIGHTLESS = frozenset(
    {"drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate", "img_size"}
)  # change no weight: published ones fit


@dataclass
class SwinOptions(BackboneOptions):
    """Options of a Swin Transformer of timm."""

    pad_before_shift: bool = option(
        True,
        help="of maps that are no multiple of the window, as Swin's detection code does; false: as timm",
        before=False,
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what makes the options more than those of an architecture, or of one that nobody has weights for."""
        if self.pretrained and (others := sorted(set(self.model_args) - WEIGHTLESS)):
            yield (
                f"{at}.pretrained=true: nobody publishes weights for {self.name} with "
                f"{', '.join(f'model_args.{name}' for name in others)}; choose swin_t, swin_s, swin_b or swin_l "
                f"unchanged, or give {at}.weights=FILE"
            )
        for key, value in self.model_args.items():  # they come with checkpoints, and may name files to timm
            if key in FIXED:
                yield f"{at}.model_args.{key}: not to be chosen"
            numbers = value if isinstance(value, list | tuple) else [value]
            if not key.isidentifier() or not all(isinstance(number, int | float) for number in numbers):
                yield f"{at}.model_args.{key} is no number or list of numbers"


def attend(block: SwinTransformerBlock, apart: Tensor, compiled: bool, pad_before_shift: bool, x: Tensor) -> Tensor:
    """(Shifted-)window attention of `block`: (B, H, W, C) -> (B, H, W, C)."""
    with precision_of(block.attn.qkv, x):
        if in_parts(block):
            return chunked_window_attention(block, apart, x, compiled=compiled, pad_before_shift=pad_before_shift)
        normed = block.norm1(x)
        if not pad_before_shift:
            return block._attn(normed)
        height, width = x.shape[1:3]
        return block._attn(pad_to_windows(normed, *block.window_size))[:, :height, :width]


def transform(block: SwinTransformerBlock, compiled: bool, x: Tensor) -> Tensor:
    """MLP of `block`: (B, H, W, C) -> (B, H, W, C)."""
    with precision_of(block.mlp.fc1, x):
        return chunked_mlp(block, x, compiled) if in_parts(block) else block.mlp(block.norm2(x))


def in_parts(block: nn.Module) -> bool:
    """Whether nothing is kept for a backward pass, so that little need be held at once. Exporters get timm's own."""
    return not (torch.is_grad_enabled() or block.training or torch.compiler.is_compiling())


def precision_of(linear: nn.Module, x: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the dtype of weights that are kept in fewer bits; nothing for float32."""
    dtype = cast(Tensor, linear.weight).dtype
    if dtype not in (torch.bfloat16, torch.float16) or autocast_dtype(x) == dtype:
        return nullcontext()
    return torch.autocast(x.device.type, dtype=dtype)


def branches_of(
    block: SwinTransformerBlock, apart: Tensor, compiled: bool, pad_before_shift: bool
) -> tuple[Branch, Branch]:
    """The two residual branches of a block; their ends are timm's `drop_path1` and `drop_path2`."""
    return (
        Branch(
            "attention",
            block,
            partial(attend, block, apart, compiled, pad_before_shift),
            block.drop_path1,
            block.attn.qkv,
        ),
        Branch("mlp", block, partial(transform, block, compiled), block.drop_path2),
    )


class SwinBackbone(ResidualBackbone):
    """A timm Swin without its classifier.

    Attributes:
        model: the weights, under timm's own names.
        apart: the `shift_attn_mask` of its windows, which are of one size.
        pad_before_shift: maps that are no multiple of the window are padded before shifted windows are rolled, as
            Swin's detection code does it, with which dense models were trained. timm pads after it, which shifts the
            padding into the image, so that features at other sizes than the classifier's differ.
    """

    model: Any  # a SwinTransformer; timm declares its parts as no more than modules
    apart: Tensor

    def __init__(self, model: SwinTransformer, *, pad_before_shift: bool = True) -> None:
        super().__init__()
        self.model = model
        self.pad_before_shift = pad_before_shift
        # The classifier's norm is no part of a dense feature extractor: each stage gets an output norm of its own.
        self.model.norm = nn.Identity()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])
        self.register_buffer("apart", shift_attn_mask(*self.model.layers[0].blocks[0].window_size), persistent=False)

    def stem(self, images: Tensor) -> Tensor:
        """Patch embedding: (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C)."""
        patch_h, patch_w = self.model.patch_embed.patch_size
        height, width = images.shape[-2:]
        images = nn.functional.pad(images, (0, -width % patch_w, 0, -height % patch_h))
        return self.model.patch_embed(images)

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Keep the weight matrices of attention and MLP, nearly all of the weights, in `dtype`.

        Attention and MLP are then computed under autocast to it; the stream that they add to stays as it is.
        """
        for layer in self.model.layers:
            for block in layer.blocks:
                for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                    linear.weight.data = linear.weight.data.to(dtype)

    def no_weight_decay(self) -> set[str]:
        """The tables of relative position bias."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @property
    def stages(self) -> list[Stage]:
        """One stage per Swin layer; two branches, attention and MLP, per block."""
        stages = []
        for layer, info in zip(self.model.layers, self.model.feature_info, strict=True):
            branches = tuple(
                branch
                for block in layer.blocks
                for branch in branches_of(block, self.apart, self.compiled, self.pad_before_shift)
            )
            stages.append(Stage(info["num_chs"], info["reduction"], layer.downsample, branches))
        return stages


def build_swin(
    timm_name: str, *, pretrained: bool = False, pad_before_shift: bool = True, **model_args: Any
) -> SwinBackbone:
    """A Swin of timm's `timm_name`, accepting any image size.

    `always_partition` keeps the windows shifting where a stage is smaller than a window; without it timm decides
    that once for 224x224 images and the last stage would never shift.

    Raises:
        TypeError: it is another network, or a Swin of a number of stages that no head takes.
    """
    model = timm.create_model(
        timm_name,
        pretrained=pretrained,
        num_classes=0,
        strict_img_size=False,
        always_partition=True,
        **model_args,
    )
    if not isinstance(model, SwinTransformer) or len(model.layers) != STAGES:
        raise TypeError(f"{timm_name} is no Swin Transformer of {STAGES} stages")
    return SwinBackbone(model, pad_before_shift=pad_before_shift)


@BACKBONES.register("swin", SwinOptions)
def swin_of(options: SwinOptions, pretrained: bool) -> SwinBackbone:
    """Return the Swin that the options describe, random unless `pretrained`."""
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    return build_swin(options.timm_name, pretrained=pretrained, pad_before_shift=options.pad_before_shift, **args)
