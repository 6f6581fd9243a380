"""The tracker against cases worked out by hand, on real tensors and on tensors without contents."""

import gc

import pytest
import torch
from torch import nn

from e3va_cli.memory.tracker import StorageTracker

ROWS, WIDE, HIDDEN, OUT = 100, 64, 128, 32
FLOAT = 4  # bytes
WEIGHTS = FLOAT * (WIDE * HIDDEN + HIDDEN + HIDDEN * OUT + OUT)
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def all_head(model):
    return dict.fromkeys(model.modules(), "head")


def mlp(device):
    return nn.Sequential(nn.Linear(WIDE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT)).to(device)


@DEVICES
def test_two_layers_forward_and_backward(device):
    model, x = mlp(device), torch.empty(ROWS, WIDE, device=device)
    tracker = StorageTracker(granularity=1)
    tracker.track([x], "batch")
    with tracker.track_model(model, all_head), tracker:
        assert tracker.by_category["weights"] == WEIGHTS
        with tracker.phase("forward"):
            loss = model(x).sum()
        # The input is kept as the batch, the result of the ReLU by itself and the second layer: one storage.
        assert tracker.by_category["head"] == FLOAT * ROWS * HIDDEN
        assert tracker.by_category["transient"] == FLOAT  # the loss
        # The most was held where the ReLU's result lay beside its input.
        assert tracker.peak.total_bytes == WEIGHTS + FLOAT * ROWS * WIDE + 2 * FLOAT * ROWS * HIDDEN
        assert tracker.peak.module == "1"
        with tracker.phase("backward"):
            loss.backward()
        del loss
        gc.collect()
        assert tracker.by_category["gradients"] == WEIGHTS
        assert tracker.by_category["head"] == tracker.by_category["transient"] == 0
        # In the backward pass of the ReLU: what it kept, the gradient that comes and the one that goes, and the
        # gradients of the second layer; its own weights' gradient is the last thing that the layer before returned.
        kinds = tracker.peak.by_category
        assert tracker.peak.phase == "backward" and tracker.peak.module == "1"
        assert kinds["head"] == FLOAT * ROWS * HIDDEN
        assert kinds["gradients"] == FLOAT * (HIDDEN * OUT + OUT)
        assert 0 <= kinds["transient"] - 2 * FLOAT * ROWS * HIDDEN <= 2 * FLOAT  # and the loss, and its gradient


@DEVICES
def test_adamw_holds_two_moments(device):
    model = mlp(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = StorageTracker(granularity=1)
    with tracker.track_model(model, all_head), tracker:
        model(torch.empty(ROWS, WIDE, device=device)).sum().backward()
        before = tracker.current_bytes
        optimizer.step()
        held = [v for state in optimizer.state.values() for v in state.values()]
        tracker.track(held, "optimizer")
        counters = 4 * FLOAT  # one step counter for each of four parameters
        assert tracker.by_category["optimizer"] == 2 * WEIGHTS + counters
        assert tracker.current_bytes == before + 2 * WEIGHTS + counters
        optimizer.zero_grad()
        assert tracker.by_category["gradients"] == 0


@DEVICES
def test_views_and_in_place_results_count_once(device):
    tracker = StorageTracker(granularity=1)
    with tracker:
        x = torch.zeros(10, 10, device=device)
        views = [x[2:], x.view(-1), x.t(), x.expand(3, 10, 10), x.detach()]
        x.add_(1).mul_(2)
        assert tracker.current_bytes == FLOAT * 100
        del x
        assert tracker.current_bytes == FLOAT * 100  # a view keeps all of it
        del views
        assert tracker.current_bytes == 0
        assert tracker.peak.total_bytes == FLOAT * 100


@DEVICES
def test_temporaries_are_freed_at_once(device):
    tracker = StorageTracker(granularity=1)
    with tracker:
        x = torch.zeros(256, device=device)
        for _ in range(10):
            x = x + 1
        assert tracker.current_bytes == FLOAT * 256
        assert tracker.peak.total_bytes == 2 * FLOAT * 256


def test_sizes_are_rounded_up_as_cuda_does():
    tracker = StorageTracker()
    with tracker:
        small, exact = torch.zeros(1), torch.zeros(128)
        assert tracker.current_bytes == 1024
        del small, exact
        assert tracker.current_bytes == 0


def test_a_resized_storage_changes_its_size():
    tracker = StorageTracker(granularity=1)
    with tracker:
        x = torch.zeros(10)
        x.resize_(1000)
        assert tracker.current_bytes == FLOAT * 1000


def test_saved_tensors_belong_to_the_module_that_saves_them():
    model = nn.ModuleDict({"frozen": nn.Linear(8, 8), "tuned": nn.Linear(8, 8)})
    model["frozen"].requires_grad_(False)
    kinds = {model: "head", model["frozen"]: "backbone", model["tuned"]: "adapters"}
    tracker = StorageTracker(granularity=1)
    with tracker.track_model(model, lambda _: kinds), tracker:
        with tracker.phase("forward"):
            loss = model["tuned"](model["frozen"](torch.zeros(50, 8))).sum()
        assert tracker.by_category["adapters"] == FLOAT * 50 * 8  # made by the frozen layer, kept by the tuned one
        assert tracker.by_category["backbone"] == 0
        loss.backward()


def test_hooks_are_removed():
    model = mlp("cpu")
    tracker = StorageTracker()
    with tracker.track_model(model, all_head):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_error_in_a_module_pops_the_stack():
    model = mlp("cpu")
    tracker = StorageTracker()
    with tracker.track_model(model, all_head), tracker:
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, WIDE + 1))
        assert tracker._running == []
