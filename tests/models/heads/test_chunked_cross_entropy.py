import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from e3va_cli.models.heads import chunked_cross_entropy as module
from e3va_cli.models.heads.chunked_cross_entropy import chunked_cross_entropy

CLASSES = 5


def plain(scores, labels):
    """All pixels of the batch at once, by torch alone."""
    pixels = interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False)
    return cross_entropy(pixels, labels.long() - 1, ignore_index=-1)


def case(rows, columns, scale, batch=2):
    scores = torch.randn(batch, CLASSES, rows, columns, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, CLASSES + 1, (batch, rows * scale, columns * scale), dtype=torch.int16)
    return scores, labels


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 100])
@pytest.mark.parametrize(("rows", "columns", "scale"), [(8, 6, 4), (7, 3, 16), (1, 1, 32), (2, 5, 8), (5, 4, 1)])
def test_chunks_equal_cross_entropy_of_all_pixels(monkeypatch, rows, columns, scale, chunk_rows):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_rows * 2 * CLASSES * scale * columns * scale)
    scores, labels = case(rows, columns, scale)
    loss, expected = chunked_cross_entropy(scores, labels), plain(scores, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,), (reference,) = (torch.autograd.grad(0.4 * value, scores) for value in (loss, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)


def test_upsampled_scores_are_freed_after_each_chunk(monkeypatch):
    scores, labels = case(8, 6, 4)
    one_row = 2 * CLASSES * 4 * 6 * 4
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", one_row)
    sizes = []

    def chunk_cross_entropy(pixels, *args, **options):
        sizes.append(pixels.numel())
        return cross_entropy(pixels, *args, **options)

    monkeypatch.setattr(module, "cross_entropy", chunk_cross_entropy)
    loss = chunked_cross_entropy(scores, labels)
    assert sizes == [one_row] * 8
    saved = [t for t in saved_by(loss.grad_fn) if t.numel() >= scores.numel()]
    assert [t.shape for t in saved] == [scores.shape], "only the gradient at the scores' own size"


def saved_by(node):
    """Tensors that the nodes of a graph keep."""
    stack, seen = [node], set()
    while stack:
        one = stack.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        yield from getattr(one, "saved_tensors", ())
        stack += [parent for parent, _ in one.next_functions]


def test_float16_autocast_computes_chunks_in_float32():
    scores, labels = case(8, 6, 4)
    scores = scores.detach().float().requires_grad_()
    scale = 2.0**16
    with torch.autocast("cpu", dtype=torch.float16):
        loss = chunked_cross_entropy(scores, labels)
    (gradient,) = torch.autograd.grad(loss * scale, scores, retain_graph=True)
    (reference,) = torch.autograd.grad(plain(scores, labels) * scale, scores)
    torch.testing.assert_close(gradient, reference)
    assert [t.shape for t in saved_by(loss.grad_fn) if t.numel() >= scores.numel()] == [scores.shape]


def test_without_gradients_and_without_labels():
    scores, labels = case(4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(scores, labels), plain(scores, labels))
    loss = chunked_cross_entropy(scores, torch.zeros_like(labels))
    loss.backward()
    assert loss.item() == 0 and (scores.grad == 0).all()
