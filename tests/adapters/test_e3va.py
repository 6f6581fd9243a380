import pytest
import timm
import torch
from torch import nn

from e3va_cli.adapters import tune
from e3va_cli.adapters.dual_low_rank import DualLowRankAdapter
from e3va_cli.backbones.swin import build_swin

OPTIONS = {"rank": 16, "hidden_ratio": 0.5}


@pytest.mark.parametrize(
    ("name", "published"),
    [("swin_base_patch4_window7_224", 1_195_008), ("swin_large_patch4_window7_224", 1_792_512)],
)
def test_trainable_parameters_are_the_papers(name, published):
    with torch.device("meta"):
        extractor = tune(build_swin(name), "e3va", **OPTIONS)
    assert sum(p.numel() for p in extractor.parameters() if p.requires_grad) == published


def test_fresh_adapters_give_timms_own_normed_features():
    """Swin-T at real size, on two image sizes, one not divisible by 32."""
    backbone = build_swin("swin_tiny_patch4_window7_224")
    extractor = tune(backbone, "e3va", **OPTIONS).train()
    timms = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, strict_img_size=False, always_partition=True
    ).eval()
    timms.load_state_dict({k.replace("layers.", "layers_"): v for k, v in backbone.model.state_dict().items()})
    for size in ((224, 256), (200, 328)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            ours, theirs = extractor(images), timms(images)
        for feature, stream in zip(ours, theirs, strict=True):
            normed = nn.functional.layer_norm(stream, stream.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(feature, normed, atol=1e-5, rtol=1e-5)


def saved_by_backward(output):
    """Every node of the graph behind `output`, and the names of the leaves it reaches."""
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
    leaves = {node.variable for node in saved_by_backward(features) if hasattr(node, "variable")}
    own = {*extractor.adapters.parameters(), *extractor.norms.parameters()}
    assert leaves == own, "the graph holds exactly the adapters and the output norms"
    kinds = {type(node).__name__ for node in saved_by_backward(features)}
    assert not any("Softmax" in kind or "ScaledDotProduct" in kind for kind in kinds)
    sum(f.square().sum() for f in features).backward()
    assert all(p.grad is None for p in nano.parameters())
    assert all(p.grad is not None for p in own)


def test_the_backbone_stays_in_eval_mode(nano):
    extractor = tune(nano, "e3va", **OPTIONS)
    extractor.train()
    assert extractor.training and extractor.adapters.training
    assert not any(module.training for module in nano.modules())


def reference_features(extractor, images):
    """The highway written out from the paper's equations, with dense adapter weights."""
    backbone = extractor.backbone
    x = h = backbone.model.patch_embed(images)
    outputs = []
    for s, layer in enumerate(backbone.model.layers):
        x, h = layer.downsample(x), layer.downsample(h)
        for b, block in enumerate(layer.blocks):
            a = block._attn(block.norm1(x))
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


def test_gradients_equal_a_float64_reference(nano):
    extractor = tune(nano, "e3va", rank=4, hidden_ratio=0.5).double()
    for parameter in extractor.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # Q is not zero: every path counts
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    weights = [torch.randn(1, c, 1, 1, dtype=torch.float64) for c in nano.widths]
    trainable = [p for p in extractor.parameters() if p.requires_grad]

    def gradients(features):
        loss = sum((w * f.sin()).sum() for w, f in zip(weights, features, strict=True))
        return torch.autograd.grad(loss, trainable)

    for ours, reference in zip(
        gradients(extractor(images)), gradients(reference_features(extractor, images)), strict=True
    ):
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-9)


def adapted(adapter, highway, z):
    """What an adapter computes, by plain operators with dense weights."""
    hidden = nn.functional.gelu(z @ (adapter.down.A @ adapter.down.B) + adapter.down.bias)
    return highway + z + hidden @ (adapter.up.A @ adapter.up.B) + adapter.up.bias


def random_adapter(dtype=torch.float64):
    adapter = DualLowRankAdapter(12, hidden=6, rank=2).to(dtype)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


def test_an_adapter_starts_as_the_identity_and_learns():
    adapter = DualLowRankAdapter(32, hidden=16, rank=4)
    z, highway = torch.randn(3, 5, 7, 32), torch.randn(3, 5, 7, 32)
    torch.testing.assert_close(adapter(highway.clone(), z), highway + z, rtol=0, atol=0)
    adapter(torch.zeros_like(z), z).square().sum().backward()
    assert adapter.up.B.grad.abs().max() > 0


def test_an_adapters_gradients_are_those_of_plain_operators():
    adapter = random_adapter()
    z = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    start = torch.randn_like(z).requires_grad_()
    weight = torch.randn_like(z)
    wanted = [start, *adapter.parameters()]
    plain = torch.autograd.grad((adapted(adapter, start * 1, z).sin() * weight).sum(), wanted)
    lean = torch.autograd.grad((adapter(start * 1, z).sin() * weight).sum(), wanted)
    for ours, reference in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_an_adapter_works_in_the_highways_storage_and_keeps_z_and_two_thin_tensors():
    adapter, kept = random_adapter(torch.float32), []
    z, highway = torch.randn(2, 3, 5, 12), torch.randn(2, 3, 5, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = adapter(highway, z)
    assert result.data_ptr() == highway.data_ptr()
    weights = {p.data_ptr() for p in adapter.parameters()}
    sizes = sorted(t.numel() // 30 for t in kept if t.data_ptr() not in weights)
    assert sizes == [2, 2, 12]


def test_under_autocast_an_adapter_keeps_16_bits_and_gives_gradients_in_32(nano):
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


def test_rank_and_hidden_ratio_set_the_sizes(nano):
    adapter = tune(nano, "e3va", rank=4, hidden_ratio=0.25).adapters[2][0]
    assert adapter.down.A.shape == (128, 4) and adapter.down.B.shape == (4, 32)
    assert adapter.up.A.shape == (32, 4) and adapter.up.B.shape == (4, 128)
