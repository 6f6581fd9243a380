"""`init_from`: what a model takes from the weights of another run, and what it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import e3va_cli
from e3va_cli.config.composition import load_config
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import (
    AdapterCheckpoint,
    build_trained_backbone,
    build_trained_meta_model,
    build_trained_model,
    read_checkpoint_or_adapter,
)
from e3va_cli.export.adapter_folder import write_adapter
from e3va_cli.export.config_builder import build_adapter_config
from e3va_cli.export.initialization import Initialization, initialize
from e3va_cli.models.model import DenseModel, build_model
from e3va_cli.runs.folder import read_run_config
from e3va_cli.training.checkpoints import build_metadata, trainable_state_dict
from tests.export.crafted_runs import craft
from tests.training.small import SMALL as RUN
from tests.training.small import last

NANO = ["head.fpn_channels=32", "backbone=swin_nano"]
CASCADE = [
    *("head=cascade_mask_rcnn", "head.box.conv_channels=[32]", "head.box.hidden=32", "head.mask.channels=[16]"),
    *("head.mask.predictor_channels=16", "head.box.batch_size_per_image=16"),
]
HEADS = {
    "mask_rcnn": ["head=mask_rcnn_nano"],
    "cascade_mask_rcnn": CASCADE,
    "cascade_mask_rcnn with a box per class": [*CASCADE, "head.box.class_agnostic=false", "head.box.loss=smooth_l1"],
    "retinanet": ["head=retinanet"],
    "upernet": ["dataset=ade20k", "dataset.root=x", "head=upernet_nano", "head.auxiliary_weight=0.4"],
}
BEFORE, NOW = ("cat", "dog", "fox"), ("fox", "emu", "cat", "yak")
MATCHED = {0: 2, 2: 0}  # of NOW in BEFORE


def build(*overrides: str, classes: Sequence[str], seed: int = 7) -> tuple[DenseModel, dict[str, Any]]:
    """A model to be trained, and its metadata."""
    config = load_config("train", [*NANO, *overrides])
    torch.manual_seed(seed)
    model = build_model(config, num_classes=len(classes))
    return model, build_metadata(model.identity, config, list(classes), list(range(1, len(classes) + 1)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AdapterCheckpoint]:
    """The random weights of a run that was never trained."""

    @cache
    def read(*overrides: str, classes: tuple[str, ...] = BEFORE) -> AdapterCheckpoint:
        folder = tmp_path_factory.mktemp("runs") / "source"
        return read_checkpoint_or_adapter(str(craft(folder, *NANO, *overrides, classes=classes)), "init_from")

    return read


def start(
    checkpoint: AdapterCheckpoint, *overrides: str, classes: Sequence[str] = NOW
) -> tuple[DenseModel, Initialization, dict[str, Tensor]]:
    """A model that starts from a run, what is said of it, and its weights before."""
    model, metadata = build(*overrides, classes=classes)
    before = {name: value.clone() for name, value in trainable_state_dict(model).items()}
    return model, initialize(model, checkpoint, metadata), before


def class_outputs(head: Any) -> Iterator[tuple[Tensor, bool]]:
    """What each layer with rows per class says of fixed random input, classes moved first; and if background is one."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = type(head).__name__
    if kind == "RetinaNet":
        yield head.detector.head.classification_head([noise(1, 32, 2, 3)]).movedim(-1, 0), False  # of all anchors
    elif kind == "UPerNet":
        yield head.classifier.eval()(noise(1, 32, 2, 3)).movedim(1, 0), False
        yield head.auxiliary[1].eval()(noise(1, head.auxiliary[1][1].in_channels, 2, 3)).movedim(1, 0), False
    else:
        boxes = [head.roi_heads.box_predictor] if kind == "MaskRCNN" else [s.predictor for s in head.box_stages]
        masks = [head.roi_heads.mask_predictor] if kind == "MaskRCNN" else [m.predictor for m in head.masks]
        for predictor in boxes:
            scores, deltas = predictor(noise(5, predictor.cls_score.in_features))
            yield scores.movedim(1, 0), True
            if deltas.shape[1] > 4:
                yield deltas.unflatten(1, (-1, 4)).movedim(1, 0), kind == "MaskRCNN"
        for predictor in masks:
            yield predictor(noise(2, predictor.conv5_mask.in_channels, 3, 3)).movedim(1, 0), True


slow = pytest.mark.slow


@pytest.mark.parametrize("head", sorted(HEADS))
def test_classes_are_matched_by_name(head, source):
    """Each class scores, boxes and masks as in the source; new classes as before, background as in the source."""
    checkpoint = source(*HEADS[head])
    trained = build_trained_model(checkpoint, *build_trained_backbone(checkpoint))
    model, initialization, before = start(checkpoint, *HEADS[head])
    assert (initialization.matched_classes, initialization.new_classes) == (["fox", "cat"], ["emu", "yak"])
    assert not initialization.fresh
    after = trainable_state_dict(model)
    same = {name: value for name, value in checkpoint.state_dict.items() if value.shape == after[name].shape}
    assert len(after) > len(same) > len(after) / 2
    for name, value in same.items():
        assert torch.equal(after[name], value), name
    fresh, _ = build(*HEADS[head], classes=NOW)
    fresh.load_state_dict(same, strict=False)  # its last layers are those before
    for (ours, background), (theirs, _), (random, _) in zip(
        *(class_outputs(one.head) for one in (model, trained, fresh)), strict=True
    ):
        expected = [theirs[MATCHED[k] + background] if k in MATCHED else random[k + background] for k in range(4)]
        torch.testing.assert_close(ours, torch.stack([theirs[0], *expected] if background else expected))
        assert not torch.isclose(theirs[0], random[0]).all()
    assert sum(initialization.loaded.values()) == len(after) == len(before)


def batch(target_types: frozenset[str], classes: int) -> tuple[Tensor, list[tuple[int, int]], list[dict[str, Tensor]]]:
    """Two images of 64 pixels, with two objects each, or label maps."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]])
    labels = torch.tensor([1, classes])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 6:44, 4:40] = masks[1, 10:60, 20:60] = 1
    semantic = torch.randint(0, classes + 1, (64, 64), generator=generator)
    target = {"boxes": boxes, "labels": labels, "masks": masks, "semantic": semantic}
    kept = {"labels", *target_types}
    return images, [(64, 64)] * 2, [{name: value for name, value in target.items() if name in kept}] * 2


@pytest.mark.parametrize(
    "head", ["mask_rcnn", "upernet", *(pytest.param(name, marks=slow) for name in ("cascade_mask_rcnn", "retinanet"))]
)
def test_the_first_losses_are_the_last_of_the_source(head, source):
    checkpoint = source(*HEADS[head])
    trained = build_trained_model(checkpoint, *build_trained_backbone(checkpoint))
    model, initialization, _ = start(checkpoint, *HEADS[head], classes=BEFORE)
    assert initialization.matched_classes == list(BEFORE) and not initialization.new_classes
    losses = []
    for one in (trained, model):
        torch.manual_seed(0)  # of sampled boxes and dropout
        losses.append(one.train().losses(*batch(one.head.target_types, len(BEFORE))))
    for name, loss in losses[0].items():
        assert torch.equal(loss, losses[1][name]), name
    fresh, _ = build(*HEADS[head], classes=BEFORE)
    assert sum(fresh.train().losses(*batch(fresh.head.target_types, 3)).values()) != sum(losses[0].values())


def test_classes_that_share_a_name_keep_their_own_rows(source):
    classes = ("cat", "cat", "dog")
    checkpoint = source(*HEADS["mask_rcnn"], classes=classes)
    model, initialization, _ = start(checkpoint, *HEADS["mask_rcnn"], classes=classes)
    assert initialization.matched_classes == list(classes)
    for name, value in trainable_state_dict(model).items():
        assert torch.equal(value, checkpoint.state_dict[name]), name


PARTS = {"extractor.norms": "output norms", "extractor": "adapters", "head.neck": "neck", "head": "head"}


def unchanged_parts(model: DenseModel, before: dict[str, Tensor]) -> set[str]:
    parts: dict[str, set[bool]] = {}
    for name, value in trainable_state_dict(model).items():
        part = next(part for prefix, part in PARTS.items() if name.startswith(prefix))
        parts.setdefault(part, set()).add(torch.equal(value, before[name]))
    return {part for part, same in parts.items() if same == {True}}


MASK_RCNN, OTHERS = ["head=mask_rcnn_nano"], ["adapter=frozen", "backbone.seed=1"]
EXTRACTOR, NECK_AND_HEAD = {"output norms", "adapters"}, {"neck", "head"}
UNFIT = [
    ([], ["adapter.rank=4"], EXTRACTOR, "trained with adapter.rank=16"),
    (["adapter=frozen"], OTHERS, {"output norms"}, "trained on another backbone"),
    (MASK_RCNN, ["head=retinanet"], NECK_AND_HEAD, "trained with head=mask_rcnn"),
]
UNFIT_TOO = [
    (["adapter=lora"], [], EXTRACTOR, "trained with adapter=lora"),
    (["adapter=full"], [], EXTRACTOR, "trained with adapter=full"),
    (["adapter=lora", "adapter.alpha=2"], ["adapter=lora"], EXTRACTOR, "adapter.alpha=2.0"),
    (["adapter=frozen"], [], {"adapters"}, "not in the source"),
    (MASK_RCNN, CASCADE, set(), "not in the source"),
    ([], ["head.fpn_channels=16"], NECK_AND_HEAD, "another shape in the source"),
]


@pytest.mark.parametrize(
    ("theirs", "ours", "untouched", "reason"), [*UNFIT, *(pytest.param(*one, marks=slow) for one in UNFIT_TOO)]
)
def test_what_does_not_fit_stays_as_it_was(theirs, ours, untouched, reason, source):
    head = HEADS["retinanet"]
    model, initialization, before = start(source(*head, *theirs), *head, *ours)
    assert unchanged_parts(model, before) == untouched
    assert not untouched & initialization.loaded.keys() and initialization.loaded
    assert any(reason in one for one in initialization.fresh.values()), initialization.fresh


def test_other_anchors_leave_the_classifier_alone(source):
    """With 9 anchors of 2 classes and 3 anchors of 6 the rows are as many."""
    six = ("cat", "dog", "fox", "emu", "yak", "ape")
    checkpoint = source(*HEADS["retinanet"], classes=six[:2])
    model, initialization, before = start(checkpoint, *HEADS["retinanet"], "head.anchors_per_octave=1", classes=six)
    layer = "head.detector.head.classification_head.cls_logits"
    assert checkpoint.state_dict[f"{layer}.weight"].shape == before[f"{layer}.weight"].shape
    for name in (f"{layer}.weight", f"{layer}.bias"):
        assert torch.equal(trainable_state_dict(model)[name], before[name])
        assert initialization.fresh[name] == "other rows of each class in the source"
    assert initialization.new_classes == list(six)


def refusal(act: Callable[..., Any], *given: Any, **named: Any) -> str:
    with pytest.raises(UserError) as refused:
        act(*given, **named)
    (line,) = refused.value.messages
    assert "\n" not in line
    return line


def test_what_does_not_fit_is_refused(source):
    head = HEADS["retinanet"]
    checkpoint = source(*head)
    assert "trained on other weights of swin_nano (fingerprint" in refusal(start, checkpoint, *head, "backbone.seed=1")
    line = refusal(start, checkpoint, *head, "backbone=swin_t")
    assert line.endswith("trained on the backbone swin_nano, not on swin_t; use backbone=swin_nano")
    line = refusal(start, checkpoint, *head, "head.fpn_channels=16", "adapter.rank=4")
    assert "none of its weights fits this model (trained with adapter.rank=16; another shape in the source)" in line


def test_what_cannot_be_read_is_refused(tmp_path):
    assert "no such run folder" in refusal(e3va_cli.train, f"init_from={tmp_path}/missing", folder=tmp_path / "run")
    run = craft(tmp_path / "source", *RUN)
    line = refusal(e3va_cli.train, f"init_from={run}", resume=run)
    assert line.startswith(f"init_from and resume={run}: a resumed run continues with its own weights")
    last(run).write_bytes(last(run).read_bytes()[:-1000])
    line = refusal(e3va_cli.train, *RUN, f"init_from={run}", folder=tmp_path / "run")
    assert line.startswith(f"{last(run)}: not a readable checkpoint")


CONSTANT = [
    *RUN,
    "schedule=multistep",
    "schedule.warmup_steps=0",
    "trainer.limit_val_batches=0",
]


def test_a_run_from_an_exported_adapter_resumes_without_it(tmp_path, capsys):
    run = craft(tmp_path / "source", *RUN, classes=["circle", "cat", "ring"])
    checkpoint = read_checkpoint_or_adapter(str(run), "init_from")
    adapter, names = tmp_path / "adapter", sorted(checkpoint.state_dict)
    config = build_adapter_config(checkpoint, build_trained_meta_model(checkpoint), run)
    write_adapter(adapter, checkpoint.state_dict, config, "fp16")
    words = [*CONSTANT, f"init_from={adapter}"]
    e3va_cli.train(*words, "trainer.max_epochs=2", folder=tmp_path / "straight")
    e3va_cli.train(*words, folder=tmp_path / "stopped")
    printed = capsys.readouterr().out
    assert f"Starts from {adapter}, after 1 step" in printed
    assert "2 matched (circle, ring), 3 new (square, triangle, star)" in printed
    assert re.search(r"tensors loaded: output norms 6, adapters 96, neck 16, head 20\n", printed)

    adapter.rename(tmp_path / "elsewhere")
    e3va_cli.train("trainer.max_epochs=2", resume=tmp_path / "stopped")
    assert "Starts from" not in capsys.readouterr().out
    states = [torch.load(last(tmp_path / name), weights_only=True) for name in ("straight", "stopped")]
    assert [state["global_step"] for state in states] == [8, 8]
    for name in names:
        ours, theirs = (state["state_dict"][f"model.{name}"] for state in states)
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs), name
    saved = read_run_config(tmp_path / "stopped")
    assert saved is not None and saved["init_from"] == str(adapter)


@slow
def test_a_run_killed_before_its_first_checkpoint_starts_from_it_again(tmp_path, capsys):
    run = craft(tmp_path / "source", *RUN)
    for words in ([*CONSTANT, f"init_from={run}"], ["trainer.max_steps=1"]):
        e3va_cli.train(*words, **{"resume" if len(words) == 1 else "folder": tmp_path / "run"})
        assert f"Starts from {last(run)}, after 1 step" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "run" / "checkpoints")
