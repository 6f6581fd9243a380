import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from e3va_cli.heads.backward_at_once import losses_in_parts


def network():
    weights = [nn.Parameter(torch.randn(6, 6, dtype=torch.float64)) for _ in range(3)]
    unused = nn.Parameter(torch.randn(2, dtype=torch.float64))
    return nn.ParameterList([*weights, unused])


def parts_of(weights, log=None):
    def parts(inputs):
        for index, weight in enumerate(weights[:3]):
            hidden = (inputs["a"] @ weight).tanh() + inputs["b"]
            if log is not None:
                log.append(hidden)
            yield {f"{index}_a": hidden.square().mean(), f"{index}_b": cross_entropy(hidden, torch.arange(6) % 6)}

    return parts


def test_losses_and_gradients_are_those_of_plain_autograd():
    weights = network()
    inputs = {name: torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for name in "ab"}
    plain = {name: value for part in parts_of(weights)(inputs) for name, value in part.items()}
    ours = losses_in_parts(parts_of(weights), inputs, [weights])
    assert list(ours) == list(plain)
    for name, value in plain.items():
        assert torch.equal(ours[name], value)
    wanted = [*inputs.values(), *weights[:3]]
    reference = torch.autograd.grad(3 * sum(plain.values()), wanted)
    for gradient, expected in zip(torch.autograd.grad(3 * sum(ours.values()), wanted), reference, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_part_is_gone_before_the_next():
    weights, held = network(), []
    inputs = {
        "a": torch.randn(6, 6, dtype=torch.float64, requires_grad=True),
        "b": torch.zeros(6, 6, dtype=torch.float64),
    }

    def parts(levels):
        hidden = None
        for weight in weights[:3]:
            if hidden is not None:
                with pytest.raises(RuntimeError, match="second time"):
                    hidden.sum().backward()
                held.append(1)
            hidden = (levels["a"] @ weight).tanh().square()
            yield {str(len(held)): hidden.sum()}

    losses = losses_in_parts(parts, inputs, [weights])
    assert len(held) == 2
    torch.stack(list(losses.values())).sum().backward()
    assert inputs["b"].grad is None and weights[3].grad is None and weights[0].grad.abs().sum() > 0


def test_without_gradients_nothing_is_differentiated():
    weights = network()
    inputs = dict.fromkeys("ab", torch.ones(6, 6, dtype=torch.float64))
    with torch.no_grad():
        losses = losses_in_parts(parts_of(weights), inputs, [weights])
    assert len(losses) == 6 and not any(loss.requires_grad for loss in losses.values())


def test_under_float16_the_backward_pass_waits_for_its_scale():
    weights, log = network(), []
    inputs = {name: torch.randn(6, 6, requires_grad=True) for name in "ab"}
    with torch.autocast("cpu", dtype=torch.float16):
        losses = losses_in_parts(parts_of(weights.float(), log), inputs, [weights])
    assert log[0].grad_fn is not None
    sum(losses.values()).backward()
    assert inputs["a"].grad is not None
