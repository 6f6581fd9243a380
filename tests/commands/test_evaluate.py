"""`e3va evaluate`: the composed configuration, and the output files."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from e3va_cli.commands import evaluate
from e3va_cli.commands.saved_config import referenced_runs, with_saved_config
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import build_trained_meta_model, read_checkpoint_or_adapter
from e3va_cli.export.adapter_folder import write_adapter
from e3va_cli.export.config_builder import build_adapter_config
from tests.export.crafted_runs import craft

TINY = ["dataset.train_images=4", "dataset.val_images=3", "data.val_batch_size=2", "head.box.score_threshold=0.01"]
LABELLED = [
    "dataset=ade20k",
    "dataset.num_classes=3",
    "dataset.short_side=64",
    "dataset.max_size=96",
    "head=upernet_nano",
    "head.fpn_channels=32",
]


def crafted(folder, *words, **options):
    """A run of `words`, and an adapter exported from it."""
    run = craft(folder / "run", *words, **options)
    OmegaConf.save(OmegaConf.create(list(words)), run / ".hydra" / "overrides.yaml")
    trained = read_checkpoint_or_adapter(str(run), "checkpoint")
    description = build_adapter_config(trained, build_trained_meta_model(trained), run)
    OmegaConf.save(OmegaConf.create({**description["config"], "resume": None}), run / "config.yaml")
    write_adapter(folder / "adapter", trained.state_dict, description, "fp32")
    return run, folder / "adapter"


def on_top(place, *words):
    return with_saved_config("evaluate", list(words), str(place))


def label_maps(root, classes="sky\nroad\ntree\n"):
    for name in ("a", "b"):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        labels = np.random.default_rng(1).integers(0, 4, (40, 48), dtype=np.uint8)
        for kind, picture, suffix in (("images", pixels, "jpg"), ("annotations", labels, "png")):
            folder = root / kind / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{name}.{suffix}")
    (root / "classes.txt").write_text(classes)


def test_words_of_an_adapter(config, tmp_path):
    run, adapter = crafted(tmp_path, *TINY, "adapter.rank=4")
    ours, theirs = (config(*on_top(place, "checkpoint=x"), command="evaluate") for place in (adapter, run))
    assert ours == theirs and ours.adapter.rank == 4


def test_what_is_given_goes_on_top(config, tmp_path):
    for place in crafted(tmp_path, *TINY):
        words = ["dataset=coco", "dataset.root=x", "head.box.nms_iou=0.4", "checkpoint=x"]
        found = config(*on_top(place, *words), command="evaluate")
        assert found.dataset.val_images == "val2017", "the data set is the one given"
        assert found.head.fpn_channels == 64, "the head stays the trained one"
        assert found.head.box.nms_iou == 0.4


def test_moved_weights_take_the_place_of_fetched_ones(config, tmp_path):
    run, adapter = crafted(tmp_path, *TINY)
    (run / ".hydra" / "overrides.yaml").write_text("- backbone=swin_t\n- backbone.pretrained=true\n")
    for place in (run, adapter):
        words = on_top(place, "backbone.weights=FILE", "checkpoint=x")
        backbone = config(*words, command="evaluate").backbone
        assert backbone.weights == "FILE" and not backbone.pretrained


def test_runs_that_overrides_refer_to():
    assert (
        referenced_runs("evaluate", ["checkpoint=a", "seed=1,2"])
        == referenced_runs("evaluate", ["checkpoint=[a]"])
        == ["a"]
    )
    assert referenced_runs("evaluate", ["checkpoint=['a b',7]"]) == ["a b", "7"], "a folder may be called 7"
    assert (
        referenced_runs("train", ["resume=null"])
        == referenced_runs("train", [])
        == referenced_runs("evaluate", [])
        == []
    )


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("train", ["resume=[a,b]"], r"resume=\[a,b\]: resume takes one run"),
        ("evaluate", ["checkpoint=a,b"], r"checkpoint=a,b: checkpoint takes a run .* \[A,B\]"),
        ("evaluate", ["checkpoint=[a,[b]]"], "checkpoint takes"),
        ("evaluate", ["checkpoint=null"], "checkpoint takes"),
        ("evaluate", ["checkpoint=[]"], "checkpoint takes"),
        ("evaluate", ["checkpoint=[a,b]", "num_visualizations=1,2"], "num_visualizations=1,2: one value at a time"),
    ],
)
def test_invalid_references_to_runs(command, words, says):
    with pytest.raises(UserError, match=says) as refused:
        referenced_runs(command, words)
    assert len(refused.value.messages) == 1


def test_overrides_of_an_adapter_from_elsewhere_are_not_composed(tmp_path):
    """The record of the overrides is for people; what is composed is made of checked values."""
    _, adapter = crafted(tmp_path, *TINY)
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    content["overrides"] = ["hydra.run.dir=/tmp/out", "+hydra.callbacks.x._target_=os.system"]
    path.write_text(json.dumps(content))
    words = on_top(adapter, "checkpoint=x")
    assert not any("hydra" in word for word in words)
    content["config"]["dataset"]["metric"] = "${oc.env:HOME}"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has an interpolation"):
        on_top(adapter, "checkpoint=x")


@pytest.mark.slow
def test_a_segmenter(e3va, tmp_path):
    root = tmp_path / "data"
    label_maps(root)
    run = craft(tmp_path / "run", *LABELLED, f"dataset.root={root}", tens=False)
    e3va("export-adapter", f"checkpoint={run}", "output=adapter")
    done = e3va("evaluate", "checkpoint=adapter", "hydra.run.dir=out", "data.num_workers=0")
    names = {"metrics.json", "confusion.png", "predictions.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".hydra", *names}
    assert all(name in done.stdout for name in names)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["per_class"]) == {"sky", "road", "tree"} and 0 < metrics["pixel_accuracy"] < 1
    label_maps(tmp_path / "other", "sky\nroad\nsea\n")
    done = e3va("evaluate", "checkpoint=adapter", f"dataset.root={tmp_path}/other", "data.num_workers=0", expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert "trained on other classes than this data set has" in line


def test_a_detector_on_another_data_set_with_its_classes(e3va, tmp_path, write_coco, annotate):
    _, adapter = crafted(tmp_path, *TINY)
    names = ["circle", "square", "triangle", "star", "ring"]
    categories = [{"id": 10 * k, "name": name} for k, name in enumerate(names, start=1)]
    _, file = write_coco([annotate(1, [5, 5, 20, 15], category_id=20)], categories=categories)
    words = ["dataset=coco", f"dataset.root={tmp_path}", "dataset.val_images=images", "data.num_workers=0"]
    words += ["dataset.val_annotations=instances.json", "trainer.accelerator=cpu"]
    e3va("evaluate", f"checkpoint={adapter}", *words, "hydra.run.dir=out")
    out = tmp_path / "out"
    files = {"detections.json", "precision_recall.png", "metrics.json", "predictions.png"}
    assert {p.name for p in out.iterdir()} == {".hydra", *files}
    found = json.loads((out / "detections.json").read_text())
    assert {r["category_id"] for r in found} <= {10, 20, 30, 40, 50} and {r["image_id"] for r in found} == {5, 11}
    file.write_text(json.dumps({**json.loads(file.read_text()), "categories": categories[:4]}))
    done = e3va("evaluate", f"checkpoint={adapter}", *words, expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert "trained on other classes than this data set has" in line


def test_several_by_the_command(e3va, tmp_path):
    """A run and the adapter exported from it: they have the same results, each in a folder of its own."""
    places = ",".join(map(str, crafted(tmp_path, *TINY, "trainer.accelerator=cpu", tens=False)))
    done = e3va("evaluate", f"checkpoint=[{places}]", "hydra.run.dir=out", "trainer.accelerator=cpu")
    assert "run, adapter: one shared backbone pass" in done.stdout
    assert "run, mask" in done.stdout and "adapter, box" in done.stdout
    out = tmp_path / "out"
    names = {"metrics.json", "detections.json", "precision_recall.png", "predictions.png"}
    assert {p.name for p in out.iterdir()} == {".hydra", "run", "adapter", "metrics.json"}
    for name in names:
        one, other = ((out / folder / name).read_bytes() for folder in ("run", "adapter"))
        assert one == other, name
    assert {p.name for p in (out / "run").iterdir()} == names
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == {name: json.loads((out / name / "metrics.json").read_text()) for name in ("run", "adapter")}
    assert len(json.loads((out / "run" / "detections.json").read_text())) > 5


def test_nothing_to_measure_is_refused(config):
    cfg = config("checkpoint=x", "trainer.limit_val_batches=0", command="evaluate")
    with pytest.raises(UserError, match=r"trainer\.limit_val_batches=0: nothing to measure"):
        evaluate.run(cfg, folder=Path())
