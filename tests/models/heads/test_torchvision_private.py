"""What the package relies on in `torchvision.models.detection._utils`. If a test fails after an update of torchvision,
adapt the modules that it names."""

import torch

from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, BoxCoder, Matcher


def test_matcher_codes_and_hook_for_low_quality_matches():
    """Used by `heads/anchors.py`, `heads/rpn.py`, `heads/roi_sampling.py` and `memory/worst_case.py`."""
    calls = []

    class Recording(Matcher):
        def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
            calls.append((matches.tolist(), all_matches.tolist(), match_quality_matrix.shape))
            matches[2] = all_matches[2]

    matcher = Recording(0.7, 0.3, allow_low_quality_matches=True)
    assert (matcher.high_threshold, matcher.low_threshold) == (0.7, 0.3)
    assert (matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS) == (-1, -2)
    quality = torch.tensor([[0.1, 0.4, 0.2, 0.9], [0.2, 0.5, 0.6, 0.0]])
    assert matcher(quality).tolist() == [-1, -2, 1, 0]
    assert calls == [([-1, -2, -2, 0], [1, 1, 1, 0], quality.shape)]


def test_sampler_returns_one_mask_of_positives_and_one_of_negatives_per_image():
    """Used by `heads/roi_sampling.py` and `memory/worst_case.py`, which replaces `__call__`."""
    sampler = BalancedPositiveNegativeSampler(4, 0.25)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (4, 0.25)
    labels = [torch.tensor([3, 1, 0, 0, 0, 0, -1]), torch.tensor([0, -1, 2])]
    positives, negatives = sampler(labels)
    assert [int(mask.sum()) for mask in positives] == [1, 1]
    assert [int(mask.sum()) for mask in negatives] == [3, 1]
    for positive, negative, of_image in zip(positives, negatives, labels, strict=True):
        assert (of_image[positive > 0] > 0).all() and (of_image[negative > 0] == 0).all()


def test_box_coder_decodes_what_it_encodes():
    """Used by `heads/cascade_mask_rcnn.py`; the deltas' definition is tested in `test_cascade_mask_rcnn.py`."""
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    anchors = torch.tensor([[0.0, 0.0, 40.0, 20.0], [5.0, 5.0, 25.0, 45.0]])
    boxes = torch.tensor([[4.0, 2.0, 30.0, 22.0], [0.0, 10.0, 30.0, 40.0]])
    deltas = coder.encode_single(boxes, anchors)
    assert deltas.shape == (2, 4)
    torch.testing.assert_close(coder.decode_single(deltas.repeat(1, 3), anchors), boxes.repeat(1, 3))
