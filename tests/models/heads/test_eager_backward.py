from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from e3va_cli.memory.step import StepSize, random_batch
from e3va_cli.models.heads.eager_backward import eager_backward, one_backward_pass
from e3va_cli.models.model import build_model


def network():
    weights = [nn.Parameter(torch.randn(6, 6, dtype=torch.float64)) for _ in range(3)]
    unused = nn.Parameter(torch.randn(2, dtype=torch.float64))
    return nn.ParameterList([*weights, unused])


def chunks_of(weights, log=None):
    def chunks(inputs):
        for index, weight in enumerate(weights[:3]):
            hidden = (inputs["a"] @ weight).tanh() + inputs["b"]
            if log is not None:
                log.append(hidden)
            yield {f"{index}_a": hidden.square().mean(), f"{index}_b": cross_entropy(hidden, torch.arange(6) % 6)}

    return chunks


def plain_losses(chunks, inputs):
    return {name: value for chunk in chunks(inputs) for name, value in chunk.items()}


def test_losses_and_gradients_equal_plain_autograd():
    weights = network()
    inputs = {name: torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for name in "ab"}
    plain = plain_losses(chunks_of(weights), inputs)
    ours = eager_backward(chunks_of(weights), inputs, [weights])
    assert list(ours) == list(plain)
    for name, value in plain.items():
        assert torch.equal(ours[name], value)
    wanted = [*inputs.values(), *weights[:3]]
    reference = torch.autograd.grad(3 * sum(plain.values()), wanted)
    for gradient, expected in zip(torch.autograd.grad(3 * sum(ours.values()), wanted), reference, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_activations_are_freed_before_the_next_chunk():
    weights, held = network(), []
    inputs = {
        "a": torch.randn(6, 6, dtype=torch.float64, requires_grad=True),
        "b": torch.zeros(6, 6, dtype=torch.float64),
    }

    def chunks(levels):
        hidden = None
        for weight in weights[:3]:
            if hidden is not None:
                with pytest.raises(RuntimeError, match="second time"):
                    hidden.sum().backward()
                held.append(1)
            hidden = (levels["a"] @ weight).tanh().square()
            yield {str(len(held)): hidden.sum()}

    losses = eager_backward(chunks, inputs, [weights])
    assert len(held) == 2
    torch.stack(list(losses.values())).sum().backward()
    assert inputs["b"].grad is None and weights[3].grad is None and weights[0].grad.abs().sum() > 0


def test_no_gradients_under_no_grad():
    weights = network()
    inputs = dict.fromkeys("ab", torch.ones(6, 6, dtype=torch.float64))
    with torch.no_grad():
        losses = eager_backward(chunks_of(weights), inputs, [weights])
    assert len(losses) == 6 and not any(loss.requires_grad for loss in losses.values())


def test_float16_gradients_are_computed_in_the_backward_pass():
    weights, log = network(), []
    inputs = {name: torch.randn(6, 6, requires_grad=True) for name in "ab"}
    with torch.autocast("cpu", dtype=torch.float16):
        losses = eager_backward(chunks_of(weights.float(), log), inputs, [weights])
    assert log[0].grad_fn is not None
    sum(losses.values()).backward()
    assert inputs["a"].grad is not None


def test_losses_with_a_common_factor():
    weights = network()
    inputs = {name: torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for name in "ab"}
    plain = plain_losses(chunks_of(weights), inputs).values()
    ours = eager_backward(chunks_of(weights), inputs, [weights]).values()
    found, expected = (torch.autograd.grad(sum(3 * v for v in losses), weights[:3]) for losses in (ours, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "total",
    [
        lambda losses: 2 * losses["0_a"] + sum(value for name, value in losses.items() if name != "0_a"),
        lambda losses: losses["0_a"],
        lambda losses: sum(value for name, value in losses.items() if name != "0_a"),
    ],
    ids=["one weighted", "one alone", "all but one"],
)
def test_error_of_losses_without_a_common_factor(total):
    weights = network()
    inputs = {name: torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for name in "ab"}
    losses = eager_backward(chunks_of(weights), inputs, [weights])
    with pytest.raises(ValueError, match="one common factor"):
        total(losses).backward()


def test_expanded_and_shared_gradients_are_accumulated():
    inputs = {name: torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for name in "ab"}

    def chunks(levels):
        for factor in (1, 2, 3):
            yield {str(factor): (levels["a"] + levels["b"]).sum()}  # one number for both, expanded
            yield {f"square of {factor}": (levels["a"] + levels["b"]).square().sum()}  # one tensor for both

    found, expected = (
        torch.autograd.grad(torch.stack(losses).sum(), list(inputs.values()))
        for losses in (
            list(eager_backward(chunks, inputs, ()).values()),
            list(plain_losses(chunks, inputs).values()),
        )
    )
    torch.testing.assert_close(found, expected)


def test_backward_pass_runs_outside_of_autocast():
    """Operations in float32 under autocast have float32 gradients."""
    weight = nn.Parameter(torch.randn(32, 32))
    inputs = {"a": torch.randn(64, 32, requires_grad=True)}

    def chunks(levels):
        yield {"16 bits": (levels["a"] @ weight).float().square().mean()}
        with torch.autocast("cpu", enabled=False):
            hidden = levels["a"] @ weight
        yield {"32 bits": hidden.square().mean()}

    gradients = []
    for run in (
        lambda: eager_backward(chunks, inputs, [nn.ParameterList([weight])]),
        lambda: plain_losses(chunks, inputs),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = run()
        gradients.append(torch.autograd.grad(torch.stack(list(losses.values())).sum(), [inputs["a"], weight]))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head", ["retinanet", "cascade_mask_rcnn"])
def test_bfloat16_gradients_of_heads_equal_one_backward_pass(config, head):
    overrides = ["head.fpn_channels=32"]
    if head == "cascade_mask_rcnn":
        overrides += ["head.box.conv_channels=[32]", "head.box.hidden=32", "head.mask.channels=[32]"]
        overrides += [
            "head.rpn.post_nms_train=20",
            "head.box.batch_size_per_image=16",
            "head.mask.predictor_channels=32",
        ]
        overrides += ["head.rpn.inside_only=false"]
    model = build_model(config("adapter=frozen", f"head={head}", *overrides), num_classes=3).train()
    size = StepSize(2, (64, 64), 2, "bf16-mixed", clip_norm=None)
    batch = random_batch(size, num_classes=3, target_types=model.head.target_types)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for backward_passes in (nullcontext(), one_backward_pass()):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16), backward_passes:
            losses = model.losses(batch.images, batch.image_sizes, batch.targets)
        gradients.append(torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(trained.values())))
    roundings = 2 * torch.finfo(torch.bfloat16).eps  # of gradients that are added up in another order
    for name, ours, expected in zip(trained, *gradients, strict=True):
        assert expected.norm() > 0 and (ours - expected).norm() <= roundings * expected.norm(), name


@pytest.mark.parametrize("total", [lambda losses: torch.stack(losses).sum() / 2, sum], ids=["stacked", "added"])
def test_common_factor_is_checked_without_device_sync(total, monkeypatch):
    weights = network()
    inputs = {name: torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for name in "ab"}
    losses = eager_backward(chunks_of(weights), inputs, [weights])
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: pytest.fail("compares contents"))
    total(list(losses.values())).backward()
    assert inputs["a"].grad is not None
