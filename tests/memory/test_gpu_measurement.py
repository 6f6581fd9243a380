"""On a GPU: running out of memory is a result. Plans are compared with the allocator in tests/gpu."""

import pytest
import torch

from e3va_cli.memory.measure import OUT_OF_MEMORY, Request, measure
from e3va_cli.memory.step import StepSize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_running_out_of_memory_is_reported_as_such(config):
    options = config("backbone=swin_t", "adapter=full", "head=mask_rcnn")
    size = StepSize(2, (800, 1333), 20, "32", 1.0)
    measurement = measure(Request(options, size, 80, "cuda", warmup=1, repeats=1, memory_limit_mib=1500))
    assert measurement.error == OUT_OF_MEMORY and measurement.peak_mib is None
