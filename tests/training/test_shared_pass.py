"""Members that share a pass of the backbone equal runs alone, bit for bit on a CPU."""

import json

import pytest
import torch

from e3va_cli.errors import UserError
from e3va_cli.models.adapters.highway import forward_shared_backbone
from e3va_cli.training.run import build_run
from e3va_cli.training.shared_pass import RecordedBackbone, train_together
from tests.components import build_backbone, tune
from tests.conftest import NANO, QUICK

MEMBERS = {
    "e3va": ["adapter=e3va", "optimizer.lr=1e-3"],
    "fast": ["adapter=e3va", "optimizer.lr=1e-2", "adapter.rank=4"],
    "plus": ["adapter=e3va_plus", "adapter.activations=recompute"],
    "frozen": ["adapter=frozen"],
}
COMMON = [*QUICK, "trainer.max_epochs=2"]


def trained(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_members_equal_runs_alone(config, tmp_path):
    configs = [config(*COMMON, *options) for options in MEMBERS.values()]
    folders = [tmp_path / "together" / name for name in MEMBERS]
    together = train_together(configs, folders)
    for name, one, shared, folder in zip(MEMBERS, configs, together, folders, strict=True):
        alone = build_run(one, tmp_path / "alone" / name)
        alone.trainer.fit(alone.lightning_module, alone.data)
        weights, expected = trained(shared), trained(alone)
        assert weights.keys() == expected.keys() and alone.trainer.global_step == shared.trainer.global_step == 8
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
        metrics = [json.loads((place / "metrics.json").read_text()) for place in (folder, tmp_path / "alone" / name)]
        assert metrics[0] == metrics[1]


def test_a_member_that_fails_leaves_the_others(config, tmp_path):
    diverging = config(*COMMON, "adapter=frozen", "optimizer.lr=1e30", "trainer.gradient_clip_norm=null")
    good = config(*COMMON, "adapter=frozen", "trainer.gradient_clip_norm=null")
    first, second = train_together([diverging, good], [tmp_path / "a", tmp_path / "b"])
    assert isinstance(first, BaseException) and "finite" in str(first)
    assert second.trainer.global_step == 8 and second.lightning_module.results is not None


def test_members_stream_offloaded_weights_once():
    backbone, _ = build_backbone(**NANO, dtype="int8", offload="cpu")
    recorded = RecordedBackbone(backbone)
    members = [tune(recorded, "e3va", rank=rank, hidden_ratio=0.5) for rank in (2, 4)]
    images = torch.randn(1, 3, 64, 96)
    recorded.start_batch(("train", 0, 0))
    first = forward_shared_backbone(members[:1], images)[0]
    recorded.start_batch(("train", 0, 0))
    second = forward_shared_backbone(members[1:], images)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "fresh adapters add nothing"
    assert backbone.streamer.streamed_bytes == backbone.streamer.offloaded_bytes > 0
    assert recorded.num_params == build_backbone(**NANO)[0].num_params


@pytest.mark.parametrize(("other", "named"), [("adapter=lora", "adapter=lora"), ("seed=1", "seed")])
def test_what_cannot_be_shared_is_refused(config, tmp_path, other, named):
    with pytest.raises(UserError, match=named):
        train_together([config(*COMMON), config(*COMMON, other)], [tmp_path / "a", tmp_path / "b"])
