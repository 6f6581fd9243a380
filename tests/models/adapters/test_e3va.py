import copy

import pytest
import torch
from torch import nn

from e3va_cli.models.adapters.activation_storage import Int8Storage
from e3va_cli.models.adapters.dual_low_rank import DualLowRankAdapter
from e3va_cli.models.adapters.highway import forward_shared_backbone
from e3va_cli.models.backbones.swin import build_swin
from tests.components import tune
from tests.swin_reference import attention, stage_outputs

OPTIONS = {"rank": 16, "hidden_ratio": 0.5}


@pytest.mark.parametrize(
    ("name", "published"),
    [("swin_base_patch4_window7_224", 1_195_008), ("swin_large_patch4_window7_224", 1_792_512)],
)
def test_trainable_parameters_equal_the_paper(name, published):
    with torch.device("meta"):
        extractor = tune(build_swin(name), "e3va", **OPTIONS)
    assert sum(p.numel() for p in extractor.parameters() if p.requires_grad) == published


def test_initial_features_equal_normalized_backbone_features():
    """Swin-T at real size, on two image sizes, one not divisible by 32."""
    backbone = build_swin("swin_tiny_patch4_window7_224")
    extractor = tune(backbone, "e3va", **OPTIONS).train()
    for size in ((224, 256), (200, 328)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            ours, reference = extractor(images), stage_outputs(backbone.model, images)
        for feature, stream in zip(ours, reference, strict=True):
            normed = nn.functional.layer_norm(stream, stream.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(feature, normed, atol=1e-5, rtol=1e-5)


def graph_nodes(output):
    """All nodes of the graph of `output`."""
    seen, todo = set(), [o.grad_fn for o in output]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [child for child, _ in node.next_functions]
    return seen


def test_no_gradient_enters_attention_or_mlp(nano):
    extractor = tune(nano, "e3va", **OPTIONS).train()
    ran = []
    for stage in nano.stages:
        for branch in stage.branches:
            branch.block.norm1.register_forward_hook(lambda m, i, out: ran.append(out))
            branch.block.norm2.register_forward_hook(lambda m, i, out: ran.append(out))
            branch.block.attn.qkv.register_forward_hook(lambda m, i, out: ran.append(out))
            branch.block.mlp.fc1.register_forward_hook(lambda m, i, out: ran.append(out))
    features = extractor(torch.randn(1, 3, 64, 96, requires_grad=True))
    assert ran and not any(out.requires_grad for out in ran), "an activation of the backbone is on the tape"
    leaves = {node.variable for node in graph_nodes(features) if hasattr(node, "variable")}
    own = {*extractor.adapters.parameters(), *extractor.norms.parameters()}
    assert leaves == own, "the graph holds exactly the adapters and the output norms"
    node_names = {type(node).__name__ for node in graph_nodes(features)}
    assert not any("Softmax" in name or "ScaledDotProduct" in name for name in node_names)
    sum(f.square().sum() for f in features).backward()
    assert all(p.grad is None for p in nano.parameters())
    assert all(p.grad is not None for p in own)


def test_the_backbone_stays_in_eval_mode(nano):
    extractor = tune(nano, "e3va", **OPTIONS)
    extractor.train()
    assert extractor.training and extractor.adapters.training
    assert not any(module.training for module in nano.modules())


def reference_features(extractor, images):
    """The highway in plain operators, with dense adapter weights."""
    backbone = extractor.backbone
    x = h = backbone.model.patch_embed(images)
    outputs = []
    for s, layer in enumerate(backbone.model.layers):
        x, h = layer.downsample(x), layer.downsample(h)
        for b, block in enumerate(layer.blocks):
            a = attention(block, x, shifted=b % 2 == 1)
            x = x + a
            m = block.mlp(block.norm2(x))
            x = x + m
            for z, adapter in ((a, extractor.adapters[s][2 * b]), (m, extractor.adapters[s][2 * b + 1])):
                down = z.detach() @ (adapter.down.A @ adapter.down.B) + adapter.down.bias
                up = nn.functional.gelu(down) @ (adapter.up.A @ adapter.up.B) + adapter.up.bias
                h = h + z.detach() + up
        outputs.append(extractor.norms[s](h).permute(0, 3, 1, 2))
        x = x.detach()
    return outputs


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_gradients_equal_a_float64_reference(nano, activations):
    extractor = tune(nano, "e3va", rank=4, hidden_ratio=0.5, activations=activations).double()
    for parameter in extractor.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # so that Q is not zero
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    weights = [torch.randn(1, c, 1, 1, dtype=torch.float64) for c in nano.out_channels]
    trainable = [p for p in extractor.parameters() if p.requires_grad]

    def gradients(features):
        loss = sum((w * f.sin()).sum() for w, f in zip(weights, features, strict=True))
        return torch.autograd.grad(loss, trainable)

    for ours, reference in zip(
        gradients(extractor(images)), gradients(reference_features(extractor, images)), strict=True
    ):
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("bits", "error"), [(16, 0.005), (8, 0.01)])
def test_compression_changes_only_gradients_of_first_factors(nano, bits, error):
    exact = tune(nano, "e3va", **OPTIONS)
    rounded = tune(nano, "e3va", **OPTIONS, activations="compress", compress_bits=bits)
    for parameter in exact.adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    rounded.load_state_dict(exact.state_dict())
    images = torch.randn(2, 3, 128, 160)
    gradients = []
    for extractor in (exact, rounded):
        sum(f.sin().sum() for f in extractor(images)).backward()
        gradients.append({name: p.grad for name, p in extractor.named_parameters() if p.requires_grad})
    for name, reference in gradients[0].items():
        difference = (gradients[1][name] - reference).norm() / reference.norm()
        if name.endswith("down.A"):
            assert 0 < difference < error, name
        else:
            assert difference < 1e-5, name


def test_no_compression_without_gradients(nano, monkeypatch):
    extractor = tune(nano, "e3va", **OPTIONS, activations="compress")
    for parameter in extractor.adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(1, 3, 64, 64)
    expected = extractor(images)
    monkeypatch.setattr(Int8Storage, "pack", lambda *_: pytest.fail("no backward pass will come"))
    with torch.no_grad():
        found = extractor(images)
    assert all(torch.equal(ours, reference) for ours, reference in zip(found, expected, strict=True))


def test_memory_of_saved_activations(nano):
    sizes = {}
    for activations, bits in (("keep", 8), ("compress", 16), ("compress", 8), ("recompute", 8)):
        extractor = tune(nano, "e3va", **OPTIONS, activations=activations, compress_bits=bits)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.untyped_storage()._cdata: t.untyped_storage()}) or t, lambda t: t
        ):
            features = extractor(torch.randn(1, 3, 224, 224))
        own = {p.untyped_storage()._cdata for p in extractor.parameters()}
        sizes[activations, bits] = sum(s.nbytes() for key, s in kept.items() if key not in own)
        del features
    order = [sizes["keep", 8], sizes["compress", 16], sizes["compress", 8], sizes["recompute", 8]]
    assert order == sorted(order, reverse=True) and order[3] < 0.7 * order[0]


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_backbone_in_bfloat16_with_float32_adapters(nano, activations):
    exact = tune(copy.deepcopy(nano), "e3va", **OPTIONS)
    nano.cast_weights(torch.bfloat16)
    rounded = tune(nano, "e3va", **OPTIONS, activations=activations)
    for parameter in exact.adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    rounded.adapters.load_state_dict(exact.adapters.state_dict())
    images, kept = torch.randn(2, 3, 128, 160), []
    sum(f.sin().sum() for f in exact(images)).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        features = rounded(images)
    assert all(f.dtype == torch.float32 for f in features)
    branches = sum(len(stage) for stage in rounded.adapters)
    assert kept.count(torch.bfloat16) == (branches if activations == "keep" else 0)
    sum(f.sin().sum() for f in features).backward()
    for ours, reference in zip(rounded.adapters.parameters(), exact.adapters.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert 0 < (ours.grad - reference.grad).norm() < 0.05 * reference.grad.norm()


def test_downsampling_saves_no_activations_of_its_own(nano):
    extractor, kept = tune(nano, "e3va", **OPTIONS), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        features = extractor(torch.randn(1, 3, 96, 128))
    widths = [stage.width for stage in nano.stages]
    merged = [4 * width for width in widths[:-1]]  # channels of what patch merging norms
    assert not [t.shape for t in kept if t.ndim == 4 and t.shape[-1] in merged and t.shape[-1] not in widths]
    assert len(features) == 4


def test_recompute_under_autocast(nano):
    results = []
    for activations in ("keep", "recompute"):
        extractor = tune(nano, "e3va", **OPTIONS, activations=activations)
        generator = torch.Generator().manual_seed(3)
        for parameter in extractor.adapters.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        images = torch.randn(2, 3, 64, 96, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = extractor(images)
        sum(f.float().sin().sum() for f in features).backward()
        results.append([*features, *(p.grad for p in extractor.adapters.parameters())])
    for kept, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-6, atol=1e-6)


def test_extractors_share_one_forward_pass_of_the_backbone(nano):
    extractors = [tune(nano, "e3va", rank=rank, hidden_ratio=0.5) for rank in (2, 4, 8)]
    for parameter in (p for e in extractors for p in e.adapters.parameters()):
        nn.init.normal_(parameter, std=0.1)
    extractors[1].set_out_indices((1, 2, 3))
    ran = []
    nano.stages[0].branches[0].qkv.register_forward_hook(lambda *_: ran.append(1))
    images = torch.randn(1, 3, 64, 96)
    together = forward_shared_backbone(extractors, images)
    assert len(ran) == 1 and [len(t) for t in together] == [4, 3, 4]
    for extractor, features in zip(extractors, together, strict=True):
        for ours, alone in zip(features, extractor(images), strict=True):
            assert torch.equal(ours, alone)


def adapted(adapter, highway, z):
    """An adapter in plain operators, with dense weights."""
    hidden = nn.functional.gelu(z @ (adapter.down.A @ adapter.down.B) + adapter.down.bias)
    return highway + z + hidden @ (adapter.up.A @ adapter.up.B) + adapter.up.bias


def random_adapter(dtype=torch.float64):
    adapter = DualLowRankAdapter(12, hidden=6, rank=2).to(dtype)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


def test_adapter_is_initially_the_identity_and_has_gradients():
    adapter = DualLowRankAdapter(32, hidden=16, rank=4)
    z, highway = torch.randn(3, 5, 7, 32), torch.randn(3, 5, 7, 32)
    torch.testing.assert_close(adapter(highway.clone(), z), highway + z, rtol=0, atol=0)
    adapter(torch.zeros_like(z), z).square().sum().backward()
    assert adapter.up.B.grad.abs().max() > 0


def test_adapter_gradients_equal_plain_autograd():
    adapter = random_adapter()
    z = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    start = torch.randn_like(z).requires_grad_()
    weight = torch.randn_like(z)
    wanted = [start, *adapter.parameters()]
    plain = torch.autograd.grad((adapted(adapter, start * 1, z).sin() * weight).sum(), wanted)
    lean = torch.autograd.grad((adapter(start * 1, z).sin() * weight).sum(), wanted)
    for ours, reference in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_adapter_is_in_place_and_saves_z_and_two_low_rank_tensors():
    adapter, kept = random_adapter(torch.float32), []
    z, highway = torch.randn(2, 3, 5, 12), torch.randn(2, 3, 5, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = adapter(highway, z)
    assert result.data_ptr() == highway.data_ptr()
    weights = {p.data_ptr() for p in adapter.parameters()}
    sizes = sorted(t.numel() // 30 for t in kept if t.data_ptr() not in weights)
    assert sizes == [2, 2, 12]


def test_adapter_under_autocast_saves_16_bits_and_returns_float32_gradients(nano):
    adapter, kept = random_adapter(torch.float32), []
    z, start = torch.randn(64, 12), torch.randn(64, 12, requires_grad=True)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        result = adapter(start * 1, z)
    assert result.dtype == torch.float32
    assert all(t.dtype == torch.bfloat16 for t in kept if t.numel() in (64 * 12, 64 * 2))
    result.square().sum().backward()
    exact = torch.autograd.grad(adapted(adapter, start * 1, z).square().sum(), list(adapter.parameters()))
    for parameter, reference in zip(adapter.parameters(), exact, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - reference).norm() < 0.03 * reference.norm()


def test_adapter_shapes(nano):
    adapter = tune(nano, "e3va", rank=4, hidden_ratio=0.25).adapters[2][0]
    assert adapter.down.A.shape == (128, 4) and adapter.down.B.shape == (4, 32)
    assert adapter.up.A.shape == (32, 4) and adapter.up.B.shape == (4, 128)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["keep", "compress", "recompute"])
def test_compiled_gradients_in_one_graph(nano, activations):
    extractor = tune(nano, "e3va", **OPTIONS, activations=activations)
    for parameter in extractor.adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(1, 3, 64, 96)
    trainable = [p for p in extractor.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(sum(f.sin().sum() for f in run(images)), trainable)
        for run in (extractor, torch.compile(extractor, backend="aot_eager", fullgraph=True))
    ]
    for compiled, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain)
