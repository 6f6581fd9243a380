"""Workspaces of CUDA libraries, against sizes worked out by hand; peaks against those measured on a GPU."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d

from e3va_cli.config.composition import load_config
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.memory.tracker import StorageTracker
from e3va_cli.memory.workspaces import cudnn_workspace

MIB = 2**20
RESULTS = Path(__file__).parents[2] / "benchmarks" / "NVIDIA_H100_80GB_HBM3"
IN, OUT, SIDE = 8, 16, 10
X, Y, WEIGHT = 4 * IN * SIDE**2, 4 * OUT * SIDE**2, 4 * OUT * IN * 9  # bytes


def convolve(x, weight, **options):
    """Return the workspace of the peak of a convolution and its backward pass, each."""
    peaks = []
    tracker = StorageTracker(granularity=1, workspace=cudnn_workspace)
    with tracker:
        output = conv2d(x, weight, **options)
        peaks.append(tracker.peak.by_category["workspaces"])
        tracker.reset_peak()
        output.backward(output)
        peaks.append(tracker.peak.by_category["workspaces"])
    return peaks


def tensors(kernel=3, inputs=IN):
    x = torch.empty(1, inputs, SIDE, SIDE, device="meta", requires_grad=True)
    return x, torch.empty(OUT, inputs, kernel, kernel, device="meta", requires_grad=True)


def test_a_convolution_copies_its_tensors_to_channels_last():
    x, weight = tensors()
    assert convolve(x, weight, padding=1) == [X + WEIGHT + Y] * 2


def test_no_copies_of_channels_last_tensors():
    x, weight = (tensor.detach().to(memory_format=torch.channels_last).requires_grad_() for tensor in tensors())
    assert convolve(x, weight, padding=1) == [0, 0]


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, IN)], ids=["1x1", "depthwise"])
def test_no_workspace(kernel, groups):
    x, weight = tensors(kernel)
    weight = weight[:, : IN // groups].detach().requires_grad_()
    assert convolve(x, weight, padding=kernel // 2, groups=groups) == [0, 0]


def measured():
    """Overrides of `e3va benchmark-memory` and MiB of the steps that were measured on an H100 on 2026-11-27.

    Without mixed precision, which was measured with autocast's cache of weights. Lightning and estimates have none.
    """
    for row in json.loads((RESULTS / "2026-11-27" / "measurements.json").read_text()):
        method, *options = row["variant"].split(":")
        overrides = [f"experiment={row['experiment']}", f"data.batch_size={row['batch_size']}", f"adapter={method}"]
        overrides += [f"adapter.{option}" for option in options] + [f"trainer.precision={row['precision']}"]
        if "mixed" not in row["precision"]:
            yield [*overrides, *row["options"]], row["peak_mib"]
    for row in json.loads((RESULTS / "2026-11-27" / "backbones.json").read_text()):
        if "trainer.precision=bf16-mixed" not in row["overrides"]:
            yield row["overrides"], row["peak_mib"]


def is_quick(overrides):
    return "adapter=e3va" in overrides and not any(
        "swin_b" in o or "cascade" in o or "activations" in o for o in overrides
    )


@pytest.mark.parametrize(
    ("overrides", "peak_mib"),
    [pytest.param(*row, id=" ".join(row[0]), marks=() if is_quick(row[0]) else pytest.mark.slow) for row in measured()],
)
def test_estimates_are_within_three_percent_of_a_gpus_peak(overrides, peak_mib):
    options = load_config("benchmark_memory", overrides, complete=False)
    estimate = benchmark_spec(options).estimate(options)
    assert estimate.peak.total_bytes / MIB == pytest.approx(peak_mib, rel=0.03)
