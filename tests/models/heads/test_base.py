import copy

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from e3va_cli.config.run_config import to_dict
from tests.components import build_head

CHANNELS = [8, 16, 32, 64]
SIZE = (96, 128)


def targets(semantic):
    if semantic:
        return [{"semantic": torch.randint(0, 4, SIZE, dtype=torch.int16)} for _ in range(2)]
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [60.0, 30.0, 90.0, 70.0]])
    masks = torch.ones(2, *SIZE, dtype=torch.uint8)
    return [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks} for _ in range(2)]


@pytest.mark.parametrize("name", ["mask_rcnn_nano", "retinanet", "upernet_nano"])
def test_recomputed_neck_has_equal_gradients_and_saves_less(config, name):
    options = to_dict(config(f"head={name}", "head.fpn_channels=32", "head.recompute_neck=true").head)
    recomputed = build_head(**options, channels=CHANNELS, num_classes=3)
    kept = build_head(**{**options, "recompute_neck": False}, channels=CHANNELS, num_classes=3)
    kept.load_state_dict(recomputed.state_dict())
    maps = [torch.randn(2, c, SIZE[0] // s, SIZE[1] // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]
    images, annotated = ImageList(torch.zeros(2, 3, *SIZE), [SIZE] * 2), targets("semantic" in kept.target_types)
    results = []
    for head in (recomputed, kept):
        sizes = {}
        features = [maps[s].clone().requires_grad_() for s in head.out_indices]
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.untyped_storage()._cdata: t.nbytes}) or t, lambda t: t
        ):
            losses = head.losses(features, images, copy.deepcopy(annotated))
        sum(losses.values()).backward()
        gradients = [t.grad for t in (*features, *head.parameters())]
        results.append(([*losses.values(), *gradients], sum(sizes.values())))
    for ours, reference in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, reference)
    assert results[0][1] < results[1][1]
