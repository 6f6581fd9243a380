import torch

from e3va_cli.data.formats.shapes import CLASSES
from e3va_cli.memory.rois import add_matching_proposals
from tests.components import build_head


def test_an_image_without_objects_keeps_its_proposals(config):
    head = build_head(**vars(config("head=mask_rcnn_nano").head), channels=[32, 64, 128, 256], num_classes=len(CLASSES))
    proposals = [torch.rand(6, 4).cumsum(1) for _ in range(2)]
    targets = [{"boxes": torch.zeros(0, 4)}, {"boxes": torch.tensor([[10.0, 10.0, 20.0, 20.0]])}]
    head.rpn.forward = lambda images, pyramid, targets: (proposals, {})
    with add_matching_proposals(head):
        (none, one), _ = head.rpn(None, None, targets)
    assert torch.equal(none, proposals[0])
    torch.testing.assert_close(one[:3], targets[1]["boxes"].expand(3, 4), atol=0.2, rtol=0)
    assert torch.equal(one[3:], proposals[1][3:])
