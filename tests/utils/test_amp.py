import pytest
import torch
from torch import nn

from e3va_cli.memory.step import StepSize, random_batch, train_step
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import build_from_backbone, build_meta_model, build_model
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.amp import guard_convolutions

TRIES = 5
DTYPES = [torch.bfloat16, torch.float16]
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def poison() -> None:
    """Fill freed memory with NaN, for the next tensors and workspaces of up to a megabyte."""
    held = [torch.full((count,), float("nan")) for count in [2**power for power in range(4, 19)] * 6]
    held += [torch.full((9 * 32 * 32,), float("nan")) for _ in range(6)]
    del held


def weight_gradient(convolution, x, of_result, dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype=dtype):
        result = convolution(x)
    assert result.dtype == dtype
    poison()
    return torch.autograd.grad((result.float() * of_result).sum(), convolution.weight)[0]


def case(make, size):
    """A convolution, a guarded copy, an input, an output gradient of integers, and the exact weight gradient."""
    plain, guarded = make(), make()
    guarded.load_state_dict(plain.state_dict())
    guard_convolutions(guarded)
    x = torch.randn(2, 32, *size)
    exact = make().double()
    exact.load_state_dict(plain.state_dict())
    result = exact(x.double())
    of_result = torch.randint(-3, 4, result.shape).float()
    (reference,) = torch.autograd.grad((result * of_result).sum(), exact.weight)
    return plain, guarded, x, of_result, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1), (1, 1)),  # the smallest that went wrong with AVX-512
        (lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1), (2, 2)),  # with AMX
        (lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1), (9, 1)),
        (lambda: nn.Conv2d(32, 32, 3, stride=4, padding=1), (3, 3)),
        (lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2), (1, 5)),
        (lambda: nn.Conv2d(32, 32, 7, padding=3, groups=32), (2, 2)),
        (lambda: nn.ConvTranspose2d(32, 32, 3, stride=2, padding=1), (1, 1)),
    ],
)
def test_weight_gradients_on_tiny_maps_are_float32(make, size, dtype):
    plain, guarded, x, of_result, reference = case(make, size)
    for _ in range(TRIES):
        difference = weight_gradient(guarded, x, of_result, dtype) - reference
        assert difference.norm() < 1e-6 * reference.norm()
    rounded = weight_gradient(plain, x, of_result, dtype) - reference
    assert not rounded.norm() < 1e-5 * reference.norm(), "the unguarded convolution is less accurate, or NaN"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1), (5, 6)),
        (lambda: nn.Conv2d(32, 32, 3, padding=1), (4, 4)),
        (lambda: nn.Conv2d(32, 32, 1), (2, 2)),
    ],
)
def test_no_change_from_kernel_plus_stride(make, size, dtype):
    plain, guarded, x, of_result, _ = case(make, size)
    found = [weight_gradient(convolution, x, of_result, dtype) for convolution in (plain, guarded)]
    assert found[0].isfinite().all() and torch.equal(*found)


def test_no_change_without_autocast_gradients_or_training():
    plain, guarded, x, _, _ = case(lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1), (1, 1))
    assert torch.equal(guarded(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(guarded(x), plain(x))
        assert torch.equal(guarded.requires_grad_(False)(x), plain(x))


def options(config, *overrides):
    return config("dataset=shapes", *overrides)


@pytest.mark.parametrize("overrides", [("adapter=mona", f"head={name}") for name in ("mask_rcnn_nano", "upernet_nano")])
def test_only_models_for_training_are_guarded(config, overrides):
    plain = options(config, *overrides)
    assert plain.adapter.name in METHODS and plain.head.name in HEADS

    def guarded(model):
        return {"forward" in vars(module) for module in model.modules() if isinstance(module, CONVOLUTIONS)}

    assert guarded(build_model(plain, num_classes=3)) == {True}
    assert guarded(build_meta_model(plain, num_classes=3)) == {False}  # of which plans are made
    assert guarded(build_from_backbone(plain, *build_backbone(plain.backbone), 3)) == {False}  # what is exported


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_finite_gradients_after_nans_were_freed(config, recompute):
    """RetinaNet's coarsest map has one pixel; its neck may be recomputed in the backward pass."""
    overrides = ("adapter=frozen", "head=retinanet", "head.fpn_channels=32", f"head.recompute_neck={recompute}")
    plain = options(config, *overrides)
    model = build_model(plain, num_classes=3).train()
    size = StepSize(2, (64, 64), 2, "bf16-mixed", clip_norm=None, accumulates=True)
    batch = random_batch(size, num_classes=3, target_types=model.head.target_types)
    optimizer = build_optimizer(model, plain.optimizer)
    for _ in range(TRIES):
        poison()
        train_step(model, optimizer, batch, size)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any("extra_blocks" in name for name in gradients)
