import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from e3va_cli.models.heads.predictions import Segmentation


def stretched(values, size):
    """Bilinear interpolation between pixel centers along both axes, in float64: (K, h, w) to (K, *size)."""
    for axis, side in enumerate(size, start=1):
        old = values.shape[axis]
        at = ((np.arange(side) + 0.5) * old / side - 0.5).clip(0, old - 1)
        lower = np.floor(at).astype(int)
        upper = np.minimum(lower + 1, old - 1)
        part = (at - lower).reshape([-1 if a == axis else 1 for a in range(3)])
        values = values.take(lower, axis) * (1 - part) + values.take(upper, axis) * part
    return values


@pytest.mark.parametrize("size", [(37, 53), (61, 100), (125, 7), (1, 1)])
@pytest.mark.parametrize("classes", [1, 8, 19])
def test_labels_are_the_argmax_after_resizing(classes, size):
    found = Segmentation(torch.randn(classes, 16, 24), (64, 96), (50, 83))
    full = stretched(stretched(found.scores.double().numpy(), (64, 96))[:, :50, :83], size)
    labels = found.labels(size)
    assert labels.shape == size and labels.dtype == torch.int16
    ordered = np.sort(full, 0)
    clear = ordered[-1] - ordered[-2] > 1e-4 if classes > 1 else np.ones(size, bool)
    assert clear.mean() > 0.95
    assert (labels.numpy() == full.argmax(0) + 1)[clear].all()


def test_labels_ignore_padding():
    scores = torch.zeros(2, 64, 64)
    scores[0, :32, :32] = 1
    scores[1] = 0.5
    scores[1, 32:] = scores[1, :, 32:] = 99
    assert (Segmentation(scores, (64, 64), (32, 32)).labels((320, 45)) == 1).all()


def test_ties_go_to_the_first_class():
    scores = torch.zeros(20, 5, 5)
    scores[[3, 6, 17], 1:] = 2.0  # 3 and 6 are compared together, 17 later
    labels = Segmentation(scores, (5, 5), (5, 5)).labels((5, 5))
    assert (labels[1:] == 4).all() and (labels[0] == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_labels_of_nonfinite_scores_are_valid(bad):
    labels = Segmentation(torch.full((9, 4, 4), bad), (16, 16), (16, 16)).labels((10, 10))
    assert ((labels >= 1) & (labels <= 9)).all()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, torch.Tensor) and not one._is_view():
                self.elements = max(self.elements, one.numel())
        return result


def test_classes_are_upsampled_in_chunks():
    found = Segmentation(torch.randn(150, 8, 8), (32, 32), (30, 32))
    with Largest() as largest:
        found.labels((200, 300))
    assert largest.elements <= 8 * 200 * 300


def test_bfloat16_scores_are_compared_in_float32():
    scores = torch.randn(5, 8, 8).to(torch.bfloat16)
    labels = Segmentation(scores, (32, 32), (32, 32)).labels((57, 57))
    assert torch.equal(labels, Segmentation(scores.float(), (32, 32), (32, 32)).labels((57, 57)))
