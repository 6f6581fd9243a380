"""Every combination of method, head, data set, precision and dtype of the weights: one step each, or a clear refusal.

What meets what, and so what is run by default, where the full matrix is marked slow:

- A method and a head meet in feature maps alone: every pair of them, in float32.
- Precision and the weights' dtype act within a method: each method under each of them, on one head.
- Both meet a head in the dtype of feature maps: each head under every pair of them, on one method.
- A data set meets the rest in its batches, of what the head needs: every legal pair of data set and head goes through
  the real files, transforms, loader, trainer and measure, each under one precision. The network's steps have made-up
  batches of the same form.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache
from itertools import product

import pytest
import torch

from e3va_cli.components.options import info_of
from e3va_cli.config.composition import load_config, validate_overrides
from e3va_cli.config.run_config import TrainConfig
from e3va_cli.config.trainer import PRECISIONS
from e3va_cli.data import DATASET_FORMATS
from e3va_cli.errors import UserError
from e3va_cli.memory.step import DTYPES, StepSize, random_batch, train_step
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.adapters.e3va import E3VAOptions
from e3va_cli.models.backbones.base import BackboneOptions
from e3va_cli.models.backbones.quantization import BITS
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import build_model
from e3va_cli.optim.optimizer import OptimizerOptions, build_optimizer
from e3va_cli.training.run import build_run
from tests.conftest import QUICK
from tests.test_experiments import ade20k, coco, voc

CLASSES = 3
SEED = 5  # of a step; one that drops no branch for all images
SCALE = 2.0**16  # of losses under 16-mixed, as Lightning begins
OVERFLOWS = 2  # steps that a scaler may leave out before it has found its scale
SIDE = 64  # pixels; the last stage's map is 2 x 2
SIZE = {"batch_size": 2, "image_size": (SIDE, SIDE), "instances_per_image": 2, "clip_norm": 1.0}

METHOD_WORDS = {
    **{name: [f"adapter={name}"] for name in METHODS},
    "colin": ["adapter=colin", "adapter.orthogonality=0.001"],  # all are clipped together: more would hide the rest
    "e3va compress 8": ["adapter=e3va", "adapter.activations=compress", "adapter.compress_bits=8"],
    "e3va compress 16": ["adapter=e3va", "adapter.activations=compress", "adapter.compress_bits=16"],
    "e3va recompute": ["adapter=e3va", "adapter.activations=recompute"],
}
SMALL_RPN = [
    "head.rpn.batch_size_per_image=10000",  # all anchors, so that every level of the pyramid is trained
    "head.rpn.post_nms_train=20",
    "head.rpn.post_nms_test=20",
]
FEW = ["head.box.score_threshold=0", "head.box.detections_per_image=5"]  # an untrained head finds something too
HEAD_WORDS = {
    "mask_rcnn_nano": [*SMALL_RPN, *FEW],
    "cascade_mask_rcnn": [
        *SMALL_RPN,
        "head.rpn.anchor_sizes=[8,16,32,8,8]",  # inside the image on every level, so that all are trained
        *FEW,
        "head.fpn_channels=32",
        "head.box.conv_channels=[32]",
        "head.box.hidden=32",
        "head.box.batch_size_per_image=16",
        "head.mask.channels=[32]",
        "head.mask.predictor_channels=32",
    ],
    "retinanet": [
        "head.fpn_channels=32",
        "head.score_threshold=0",
        "head.topk_candidates=20",
        "head.detections_per_image=5",
    ],
    "upernet_nano": ["head.fpn_channels=32"],
}
KINDS = next(info_of(one).choices for one in fields(BackboneOptions) if one.name == "dtype")
CHOICES = {f"adapter.{one.name}": info_of(one).choices for one in fields(E3VAOptions)}
CLASHES = {("16-mixed", "bfloat16"), ("bf16-mixed", "float16")}
FROZEN = ("e3va", "e3va_plus", "frozen")  # methods that send no gradient through the backbone
LEGAL_HEADS = {
    "shapes": ["mask_rcnn_nano", "cascade_mask_rcnn", "retinanet"],
    "coco": ["mask_rcnn_nano", "cascade_mask_rcnn", "retinanet"],
    "voc": ["retinanet"],
    "ade20k": ["upernet_nano"],
}

Combination = tuple[str, str, str, str]  # method, head, precision, dtype


def of_default_suite() -> set[Combination]:
    pairs = list(product(PRECISIONS, set(KINDS) - set(BITS)))
    return {
        *((method, head, "32", "float32") for method, head in product(METHOD_WORDS, HEAD_WORDS)),
        *((method, "retinanet", precision, "float32") for method, precision in product(METHOD_WORDS, PRECISIONS)),
        *((method, "retinanet", "32", kind) for method, kind in product(METHOD_WORDS, KINDS)),
        *(("e3va", head, *pair) for head, pair in product(HEAD_WORDS, pairs)),
    }


def refused(combination: Combination) -> bool:
    method, _, precision, kind = combination
    return (not method.startswith(FROZEN) and kind != "float32") or (precision, kind) in CLASHES


def cases() -> list:
    default = of_default_suite()
    legal = [one for one in product(METHOD_WORDS, HEAD_WORDS, PRECISIONS, KINDS) if not refused(one)]
    return [
        pytest.param(*one, id=" ".join(one), marks=[pytest.mark.slow] * (one not in default))
        for one in sorted(legal, key=lambda one: one not in default)
    ]


@cache
def composed(*words: str) -> TrainConfig:
    config: TrainConfig = load_config("train", words)
    return config


def configuration(method: str, head: str, dtype: str) -> TrainConfig:
    """Parts of several configurations put together: groups know nothing of each other."""
    base = composed()
    return replace(
        base,
        backbone=replace(base.backbone, dtype=dtype),
        adapter=composed(*METHOD_WORDS[method]).adapter,
        head=composed(f"head={head}", *HEAD_WORDS[head]).head,
        optimizer=replace(base.optimizer, lr=1e-3, weight_decay=0.0),  # what moves, moves by its gradient
    )


def autocast(precision: str):
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def prepared(method: str, head: str, dtype: str):
    """A model with its trained parts away from zeros, behind which no gradient flows; and a batch."""
    torch.manual_seed(0)
    model = build_model(configuration(method, head, dtype), num_classes=CLASSES).train()
    for parameter in model.extractor.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model, random_batch(
        StepSize(**SIZE, precision="32"), num_classes=CLASSES, target_types=model.head.target_types
    )


def step(model, batch, optimizer_options: OptimizerOptions, precision: str) -> float:
    """One step as on a GPU, with a gradient scaler where it has one; the loss."""
    seen: list[dict] = []
    losses = model.losses
    model.losses = lambda *given: seen.append(losses(*given)) or seen[-1]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if precision == "16-mixed" else None
    optimizer = build_optimizer(model, optimizer_options)
    for _ in range(OVERFLOWS + 1):
        scale = scaler.get_scale() if scaler else None
        torch.manual_seed(SEED)
        train_step(model, optimizer, batch, StepSize(**SIZE, precision=precision), scaler=scaler)
        if scaler is None or scaler.get_scale() == scale:
            break
    found = seen[-1]
    assert found and all(value.isfinite() for value in found.values()), found
    return float(torch.stack(list(found.values())).detach().sum())


@cache
def reference_loss(method: str, head: str) -> float:
    """In float32 throughout, with nothing compressed or recomputed, by plain calls."""
    model, batch = prepared(method, head, "float32")
    torch.manual_seed(SEED)
    with torch.no_grad():
        losses = model.losses(batch.images, batch.image_sizes, batch.targets)
    return float(torch.stack(list(losses.values())).sum())


@pytest.mark.parametrize(("method", "head", "precision", "dtype"), cases())
def test_a_step_and_a_prediction(method, head, precision, dtype):
    model, batch = prepared(method, head, dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = step(model, batch, configuration(method, head, dtype).optimizer, precision)
    assert loss == pytest.approx(reference_loss(method.partition(" ")[0], head), rel=0.1)

    assert all(parameter.isfinite().all() for parameter in model.parameters())
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved <= trained
    if precision == "16-mixed":  # RetinaNet's coarsest levels hold background alone: their gradients underflow
        trained = {name for name in trained if "extra_blocks" not in name}
    assert moved >= trained

    model.eval()
    with autocast(precision):
        found = model.predict(batch.images, batch.image_sizes)
    assert len(found) == len(batch)
    for one in found:
        check_finding(one, model.head.target_types)


def check_finding(found, needs) -> None:
    assert found.scores.isfinite().all()
    if "semantic" in needs:
        labels = found.labels((SIDE, SIDE))
        assert labels.shape == (SIDE, SIDE) and labels.min() >= 1 and labels.max() <= CLASSES
        return
    assert 0 < len(found) <= 5 and found.boxes.min() >= 0 and found.boxes.max() <= SIDE
    assert found.scores.min() >= 0 and found.scores.max() <= 1
    assert found.labels.min() >= 1 and found.labels.max() <= CLASSES
    masks = [] if found.masks is None else list(found.paste_masks())
    assert [mask.shape for mask in masks] == [(SIDE, SIDE)] * (len(found) if "masks" in needs else 0)


def test_every_choice_is_in_the_matrix():
    assert {name.partition(" ")[0] for name in METHOD_WORDS} == set(METHODS)
    assert {composed(f"head={name}").head.name for name in HEAD_WORDS} == set(HEADS)
    assert set(LEGAL_HEADS) == set(DATASET_FORMATS)
    assert set(DTYPES) == set(PRECISIONS)
    words = {word for words in METHOD_WORDS.values() for word in words}
    for option in ("adapter.activations", "adapter.compress_bits"):
        default = getattr(composed().adapter, option.partition(".")[2])
        assert {f"{option}={value}" for value in CHOICES[option] if value != default} <= words


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FROZEN)))
@pytest.mark.parametrize("dtype", [kind for kind in KINDS if kind != "float32"])
def test_gradients_through_weights_in_fewer_bits_are_refused(method, dtype):
    with pytest.raises(UserError) as error:
        build_model(configuration(method, "retinanet", dtype), num_classes=CLASSES)
    (line,) = error.value.messages
    assert f"backbone.dtype={dtype}" in line and f"adapter={method}" in line
    assert "set backbone.dtype=float32" in line


@pytest.mark.parametrize(("precision", "dtype"), sorted(CLASHES))
def test_two_kinds_of_16_bits_are_refused(precision, dtype):
    with pytest.raises(UserError) as error:
        validate_overrides("train", [f"trainer.precision={precision}", f"backbone.dtype={dtype}"])
    (line,) = error.value.messages
    (same,) = {"bfloat16", "float16"} - {dtype}
    assert f"backbone.dtype={dtype} " in line and f"trainer.precision={precision};" in line
    assert f"choose backbone.dtype={same} or float32, or trainer.precision=32" in line
    validate_overrides("train", [f"trainer.precision={precision}", f"backbone.dtype={same}"])


@pytest.mark.parametrize(
    ("word", "legal"),
    [
        ("adapter=prompt", sorted(METHODS)),
        ("dataset=cityscapes", sorted(DATASET_FORMATS)),
        ("trainer.precision=64", PRECISIONS),
        ("trainer.precision=bf16-true", ["bf16-mixed"]),
        ("backbone.dtype=int2", KINDS),
        ("adapter.activations=drop", CHOICES["adapter.activations"]),
        ("adapter.compress_bits=4", CHOICES["adapter.compress_bits"]),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(word, legal):
    with pytest.raises(UserError) as error:
        validate_overrides("train", [word])
    (line,) = error.value.messages
    assert line.startswith(word)
    assert all(str(choice) in line.removeprefix(word) for choice in legal)


@pytest.mark.parametrize(
    ("words", "legal"),
    [
        (["adapter=lora", "adapter.activations=compress"], "adapter=e3va or e3va_plus"),
        (["dataset.root=DATA"], "dataset=ade20k or coco or voc"),
    ],
)
def test_an_option_of_another_choice_is_refused_with_those_that_have_it(words, legal):
    with pytest.raises(UserError) as error:
        validate_overrides("train", words)
    (line,) = error.value.messages
    assert line.startswith(f"{words[-1]}: unknown option") and line.endswith(f"it is one of {legal}")


SMALL = {
    "boxes": ["dataset.train_short_sides=[64]", "dataset.val_short_side=64", "dataset.max_size=96"],
    "pixels": [
        "dataset.short_side=64",
        "dataset.max_size=96",
        "dataset.crop_size=64",
        f"dataset.num_classes={CLASSES}",
        "schedule.iterations=1",
        "trainer.val_every_epochs=1",
    ],
}
FILES = {"coco": coco, "voc": voc, "ade20k": ade20k}


def words_for(dataset: str, head: str, root: str) -> list[str]:
    """One training step and one evaluation, at the smallest size."""
    words = [word for word in QUICK if not word.startswith("dataset.")]
    words += SMALL["pixels" if dataset == "ade20k" else "boxes"]
    if dataset == "shapes":
        words += ["dataset.image_size=64", "dataset.train_images=2", "dataset.val_images=2"]
    else:
        words += [f"dataset.root={root}"]
    return [f"dataset={dataset}", f"head={head}", "data.num_workers=0", *HEAD_WORDS[head], *words]


def runs() -> list:
    """Every legal pair under every precision; by default each under one, in turn."""
    pairs = [(dataset, head) for dataset, heads in LEGAL_HEADS.items() for head in heads]
    return [
        pytest.param(*pair, precision, marks=[] if (index + turn) % len(PRECISIONS) == 0 else pytest.mark.slow)
        for index, pair in enumerate(pairs)
        for turn, precision in enumerate(PRECISIONS)
    ]


@pytest.mark.parametrize(("dataset", "head", "precision"), runs())
def test_a_data_set_under_a_head(config, tmp_path, dataset, head, precision):
    root = tmp_path / "data"
    root.mkdir()
    if dataset in FILES:
        FILES[dataset](root)
    options = config(*words_for(dataset, head, str(root)), f"trainer.precision={precision}")
    run = build_run(options, tmp_path / "run")
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.trainer.fit(run.lightning_module, run.data)
    assert run.trainer.global_step == 1
    moved = {name for name, value in run.model.named_parameters() if not value.equal(before[name])}
    trained = {name for name, value in run.model.named_parameters() if value.requires_grad}
    assert moved and moved <= trained
    kinds = {"semantic": {"mIoU"}, "masks": {"box", "mask"}, "boxes": {"box"}}
    expected = next(of_kind for need, of_kind in kinds.items() if need in run.model.head.target_types)
    assert run.lightning_module.results is not None and expected <= set(run.lightning_module.results)
    assert ("mask" in run.lightning_module.results) == ("mask" in expected)


@pytest.mark.parametrize(
    ("dataset", "head"),
    [pair for pair in product(LEGAL_HEADS, HEAD_WORDS) if pair[1] not in LEGAL_HEADS[pair[0]]],
)
def test_a_data_set_under_a_head_that_it_cannot_train_is_refused_before_it_is_read(config, tmp_path, dataset, head):
    with pytest.raises(UserError) as error:
        build_run(config(*words_for(dataset, head, "nowhere")), tmp_path)
    (line,) = error.value.messages
    heads = {name.removesuffix("_nano") for name in LEGAL_HEADS[dataset]}
    assert set(line.partition("for this data: head=")[2].partition(";")[0].split(" or ")) == heads
    assert "nowhere" not in line


def test_float16_on_a_cpu_is_replaced_aloud(config, tmp_path):
    words = words_for("shapes", "retinanet", "")
    with pytest.warns(UserWarning, match=r"fp16 is not supported on CPU\. Using `precision='bf16-mixed'` instead"):
        run = build_run(config(*words, "trainer.precision=16-mixed"), tmp_path)
    assert run.trainer.precision == "bf16-mixed"
