"""Every shipped YAML composes, and names the commands that use it."""

from functools import partial
from pathlib import Path

import e3va_cli.conf
import pytest

from e3va_cli.adapters import METHODS
from e3va_cli.composition import checked
from e3va_cli.config import register_schemas
from e3va_cli.data import SOURCES
from e3va_cli.errors import UserError
from e3va_cli.heads import HEADS
from e3va_cli.metrics import EVALUATORS
from e3va_cli.model import outline_model, require_suited

CONF = Path(next(iter(e3va_cli.conf.__path__)))
GROUPED = sorted(p.relative_to(CONF) for p in CONF.glob("*/*.yaml"))
ROOT = ["dataset.root=x"]


@pytest.mark.parametrize("path", GROUPED, ids=str)
def test_every_choice_composes(path):
    register_schemas()
    group, name = path.parts[0], path.stem
    words = [f"{group}={name}"]
    text = (CONF / path).read_text()
    checked("train", [*words, *(ROOT if "dataset.root=" in text else [])])


@pytest.mark.parametrize(
    "path", [p for p in GROUPED if p.parts[0] in ("backbone", "adapter", "head", "dataset")], ids=str
)
def test_a_choice_opens_with_the_command_that_uses_it(path):
    head = (CONF / path).read_text().splitlines()[:3]
    assert any(line.startswith("# e3va train") for line in head)


ONLY = {
    "shapes": {"mask_rcnn", "cascade_mask_rcnn", "retinanet"},
    "coco": {"mask_rcnn", "cascade_mask_rcnn", "retinanet"},
    "voc": {"retinanet"},
    "ade20k": {"upernet"},
}


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("dataset", sorted(SOURCES))
def test_a_head_is_accepted_for_data_that_it_can_be_trained_on(config, dataset, head):
    options = config(f"dataset={dataset}", f"head={head}", *ROOT[: dataset != "shapes"])
    if head in ONLY[dataset]:
        require_suited(options)
        return
    with pytest.raises(UserError) as refused:
        require_suited(options)
    (line,) = refused.value.messages
    assert f"head={head}" in line and f"dataset={dataset}" in line
    advice = line.partition("for this data: head=")[2].partition("; for this head: dataset=")
    assert set(advice[0].split(" or ")) == ONLY[dataset]
    assert set(advice[2].split(" or ")) == {name for name, heads in ONLY.items() if head in heads}


def test_a_data_set_brings_its_head_and_its_metric(config):
    for dataset, head, metric in (
        ("shapes", "mask_rcnn", "coco"),
        ("coco", "mask_rcnn", "coco"),
        ("voc", "retinanet", "voc"),
        ("ade20k", "upernet", "miou"),
    ):
        options = config(f"dataset={dataset}", *ROOT[: dataset != "shapes"])
        assert (options["head"]["name"], options["dataset"]["metric"]) == (head, metric)
        needs, _ = EVALUATORS[metric]
        assert needs <= HEADS[head].needs <= SOURCES[dataset].offers


def test_registries_and_choices_agree():
    names = {group: {p.stem for p in (CONF / group).glob("*.yaml")} for group in ("adapter", "dataset", "head")}
    assert set(METHODS) == names["adapter"]
    assert set(SOURCES) == names["dataset"]
    assert set(HEADS) <= names["head"]


@pytest.mark.parametrize("option", ["backbone.dtype=bfloat16", "backbone.compile=true"])
def test_what_a_frozen_backbone_alone_can_is_refused_where_gradients_go_through_it(config, option):
    for method in METHODS:
        options = config(option, f"adapter={method}")
        if method in ("frozen", "e3va"):
            require_suited(options)
            outline_model(options, num_classes=3)
            continue
        for check in (require_suited, partial(outline_model, num_classes=3)):
            with pytest.raises(UserError, match=f"{option}: adapter={method} sends .* adapter=e3va or frozen"):
                check(options)
