import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu, layer_norm

from e3va_cli.models.adapters.activation_storage import CastStorage, Int8Storage
from e3va_cli.models.adapters.e3va_plus import MultiScaleFilter, NeighborhoodAdapter
from e3va_cli.models.backbones.swin import build_swin
from tests.components import tune
from tests.swin_reference import attention, stage_outputs

OPTIONS = {"rank": 4}


def randomize(extractor, generator=None):
    for parameter in extractor.adapters.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)


def plain_update(adapter, x):
    """`GELU(Filter(LN(x) A)) Q` with three convolutions."""
    y = (layer_norm(x, x.shape[-1:]) @ adapter.A).permute(0, 3, 1, 2)
    convolutions = [conv2d(y, k, padding=k.shape[-1] // 2, groups=len(k)) for k in adapter.filter.kernels]
    filtered = y + sum(convolutions) / 3 + adapter.filter.bias.view(-1, 1, 1)
    return gelu(filtered).permute(0, 2, 3, 1) @ adapter.Q


def reference_features(extractor, images):
    """The highway in plain operators."""
    model = extractor.backbone.model
    x = h = model.patch_embed(images).detach()
    outputs = []
    for s, layer in enumerate(model.layers):
        x, h = layer.downsample(x).detach(), layer.downsample(h)
        for b, block in enumerate(layer.blocks):
            for offset in (0, 1):
                z = attention(block, x, shifted=b % 2 == 1) if offset == 0 else block.mlp(block.norm2(x))
                x = (x + z).detach()
                h = h + z.detach() + plain_update(extractor.adapters[s][2 * b + offset], x)
        outputs.append(extractor.norms[s](h).permute(0, 3, 1, 2))
    return outputs


@pytest.mark.parametrize(
    ("name", "millions"), [("swin_base_patch4_window7_224", 86.7), ("swin_large_patch4_window7_224", 195.0)]
)
def test_trainable_parameters_are_within_two_percent(name, millions):
    with torch.device("meta"):
        extractor = tune(build_swin(name), "e3va_plus", rank=32)
    assert sum(p.numel() for p in extractor.parameters() if p.requires_grad) < 0.02e6 * millions


def test_initial_features_equal_normalized_backbone_features(nano):
    extractor = tune(nano, "e3va_plus", **OPTIONS).train()
    images = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        reference = stage_outputs(nano.model, images)
    for feature, stream in zip(extractor(images), reference, strict=True):
        normed = layer_norm(stream, stream.shape[-1:]).permute(0, 3, 1, 2)
        torch.testing.assert_close(feature, normed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_gradients_equal_a_float64_reference(nano, activations):
    extractor = tune(nano, "e3va_plus", **OPTIONS, activations=activations).double()
    randomize(extractor)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    weights = [torch.randn(1, c, 1, 1, dtype=torch.float64) for c in nano.out_channels]
    trainable = [p for p in extractor.parameters() if p.requires_grad]

    def gradients(features):
        return torch.autograd.grad(sum((w * f.sin()).sum() for w, f in zip(weights, features, strict=True)), trainable)

    ours, reference = gradients(extractor(images)), gradients(reference_features(extractor, images))
    for found, expected in zip(ours, reference, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_features_without_gradients_equal_those_with(nano):
    extractor = tune(nano, "e3va_plus", **OPTIONS)
    randomize(extractor)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        without = extractor(images)
    assert all(torch.equal(a, b) for a, b in zip(without, extractor(images), strict=True))


@pytest.mark.parametrize(("bits", "error"), [(16, 0.005), (8, 0.01)])
def test_compression_changes_only_gradients_of_first_factors(nano, bits, error):
    exact = tune(nano, "e3va_plus", **OPTIONS)
    rounded = tune(nano, "e3va_plus", **OPTIONS, activations="compress", compress_bits=bits)
    randomize(exact)
    rounded.load_state_dict(exact.state_dict())
    images = torch.randn(2, 3, 128, 160)
    gradients = []
    for extractor in (exact, rounded):
        sum(f.sin().sum() for f in extractor(images)).backward()
        gradients.append({name: p.grad for name, p in extractor.named_parameters() if p.requires_grad})
    for name, reference in gradients[0].items():
        difference = (gradients[1][name] - reference).norm() / reference.norm()
        assert 0 < difference < error if name.endswith(".A") else difference < 1e-5, name


def test_recompute_under_autocast(nano):
    results = []
    for activations in ("keep", "recompute"):
        extractor = tune(nano, "e3va_plus", **OPTIONS, activations=activations)
        generator = torch.Generator().manual_seed(3)
        randomize(extractor, generator)
        images = torch.randn(2, 3, 64, 96, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = extractor(images)
        sum(f.float().sin().sum() for f in features).backward()
        results.append([*features, *(p.grad for p in extractor.adapters.parameters())])
    for kept, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", [CastStorage(), Int8Storage()])
def test_saves_the_input_and_one_low_rank_tensor(storage):
    adapter = NeighborhoodAdapter(64, rank=4, storage=storage)
    highway, z, x = (torch.randn(2, 8, 8, 64) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(highway, z, x)
    own = {p.data_ptr() for p in adapter.parameters()}
    numbers = sorted(t.numel() for t in saved if t.data_ptr() not in own)
    assert numbers[-2:] == [128 * 4, 128 * 64]


def test_the_filter_is_one_convolution_equal_to_three():
    filter_ = MultiScaleFilter(5).double()
    y = torch.randn(2, 9, 11, 5, dtype=torch.float64)
    channels_first = y.permute(0, 3, 1, 2)
    three = [conv2d(channels_first, k, padding=k.shape[-1] // 2, groups=5) for k in filter_.kernels]
    expected = channels_first + sum(three) / 3 + filter_.bias.view(-1, 1, 1)
    torch.testing.assert_close(filter_(y), expected.permute(0, 2, 3, 1))
