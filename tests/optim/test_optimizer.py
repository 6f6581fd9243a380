import re

from torch import nn

from tests.components import build_optimizer, tune


def test_vectors_are_not_decayed_and_frozen_weights_left_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    decayed, plain = build_optimizer(model, lr=0.1, weight_decay=0.05, betas=[0.8, 0.9]).param_groups
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    }
    assert decayed["lr"] == 0.1 and decayed["betas"] == (0.8, 0.9)


def test_as_mmdetection_decays(nano):
    """Its `paramwise_cfg` of Swin: custom_keys `norm` and `relative_position_bias_table` with decay_mult 0."""
    extractor = tune(nano, "mona", hidden=8, dropout=0.1)
    extractor.requires_grad_(True)
    groups = build_optimizer(extractor, lr=0.1, weight_decay=0.05, betas=[0.9, 0.999], decay_biases=True).param_groups
    names = {id(p): name for name, p in extractor.named_parameters()}
    plain = {names[id(p)] for p in groups[1]["params"]}
    keys = re.compile(r"norm|relative_position_bias_table")
    scales = {name for name in names.values() if name.endswith("norm_scale")}  # `gamma` there
    assert plain == {name for name in names.values() if keys.search(name)} - scales
    assert {names[id(p)] for p in groups[0]["params"]} == set(names.values()) - plain
    assert any(name.endswith("qkv.bias") for name in names.values() if name not in plain)


def test_a_learning_rate_for_adapters(nano):
    model = nn.ModuleDict({"extractor": tune(nano, "e3va", rank=2, hidden_ratio=0.5), "head": nn.Linear(4, 2)})
    options = {"lr": 0.1, "weight_decay": 0.0, "betas": [0.9, 0.999]}
    groups = build_optimizer(model, **options, adapter_lr_scale=5.0).param_groups
    trainable = {id(p) for p in model["extractor"].parameters() if p.requires_grad}
    assert [round(group["lr"], 6) for group in groups] == [0.5, 0.5, 0.1, 0.1]
    assert {id(p) for group in groups[:2] for p in group["params"]} == trainable
    assert [[id(p) for p in group["params"]] for group in groups[2:]] == [
        [id(model["head"].weight)],
        [id(model["head"].bias)],
    ]
    assert len(build_optimizer(model, **options).param_groups) == 2


def test_position_biases_are_not_decayed(nano):
    decayed, plain = build_optimizer(tune(nano, "full"), lr=0.1, weight_decay=0.05, betas=[0.9, 0.999]).param_groups
    tables = {id(p) for n, p in nano.named_parameters() if n.endswith("relative_position_bias_table")}
    assert len(tables) == 8
    assert tables <= {id(p) for p in plain["params"]} and not tables & {id(p) for p in decayed["params"]}
