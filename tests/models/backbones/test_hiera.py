"""What is particular to Hiera; the rest is in `test_families.py`."""

import pytest
import torch

from e3va_cli.errors import UserError
from tests.components import build_backbone
from tests.models.backbones.test_families import small


@pytest.mark.parametrize("timm_name", ["hiera_tiny_224", "resnet18"])
def test_other_networks_are_refused(timm_name):
    with pytest.raises(UserError, match=f"cannot build timm_name={timm_name}"):
        build_backbone(name="other", family="hiera", timm_name=timm_name, model_args={})


def test_the_first_attention_of_a_stage_reads_the_stream_before_downsampling():
    backbone = small("hiera")
    x = torch.randn(1, 16, 24, backbone.stages[0].width)
    with torch.no_grad():
        for stage, end in zip(backbone.stages[1:], backbone.model.stage_ends, strict=False):
            block = backbone.model.blocks[end + 1]
            between, (attention, mlp, *_) = stage.start(x)
            between = between + attention(torch.zeros(0))  # ignores the stream that it is called with
            torch.testing.assert_close(between + mlp(between), block(x), atol=1e-5, rtol=1e-5)
            x = block(x)


def test_no_weight_decay_of_position_embeddings():
    assert small("hiera").no_weight_decay() == {"model.pos_embed", "model.pos_embed_window"}
