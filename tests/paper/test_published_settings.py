"""Both published settings at full size: the estimated saving of E3VA is at least the published one."""

import pytest

from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.step import StepSize
from e3va_cli.paper.published import SETTINGS


@pytest.mark.parametrize("published", SETTINGS, ids=lambda s: s.experiment)
def test_e3va_saves_what_the_paper_says(config, published):
    peaks = {}
    for method in ("full", "e3va"):
        arguments = [f"experiment={published.experiment}", f"adapter={method}", "dataset.root=x"]
        options = config(*arguments)
        assert options.head.name == published.head and options.backbone.name == published.backbone
        image_size = options.dataset.largest_image
        assert image_size == published.image_size
        size = StepSize(2, image_size, instances_per_image=20, precision="32", clip_norm=1.0)
        followed = estimate_memory(options, size, num_classes=options.dataset.planned_classes)
        peaks[method] = followed.peak.total_bytes
    assert 100 * (1 - peaks["e3va"] / peaks["full"]) >= published.saved_pct("e3va")
