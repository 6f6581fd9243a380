"""`train` and `check-data` on COCO folders: sound ones, and ones that a user has to mend."""

import json

import pytest
from PIL import Image

from e3va_cli.commands import check_data

SMALL = [
    "dataset=coco",
    "head=mask_rcnn_nano",
    "dataset.train_short_sides=[64]",
    "dataset.val_short_side=64",
    "dataset.max_size=96",
    "dataset.train_images=images",
    "dataset.val_images=images",
    "dataset.train_annotations=instances.json",
    "dataset.val_annotations=instances.json",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.tensorboard=false",
    "data.batch_size=1",
]


@pytest.fixture
def root(write_coco, annotate, tmp_path):
    """A sound data set of two images."""
    write_coco([annotate(1, [5, 5, 20, 15]), annotate(2, [2, 3, 30, 20], image_id=5, category_id=7)])
    return tmp_path


def refused(done, *says):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("e3va: error: "), done.stderr
    assert all(word in lines[0] for word in says), lines[0]


def change(root, **lists):
    path = root / "instances.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **lists}))


def test_train_and_check_a_sound_folder(e3va, root):
    out = e3va("check-data", *SMALL, f"dataset.root={root}", f"hydra.run.dir={root}/check").stdout
    assert "no problems" in out.lower() and "cat" in out and "dog" in out
    assert {p.name for p in (root / "check").glob("*.png")} == {"train.png", "val.png"}
    e3va("train", *SMALL, f"dataset.root={root}", f"hydra.run.dir={root}/run", "data.num_workers=0")
    metrics = json.loads((root / "run" / "metrics.json").read_text())
    assert set(metrics["mask"]["per_class"]) == {"cat", "dog"}


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_missing_image(e3va, root, workers):
    (root / "images" / "a.png").unlink()
    done = e3va("train", *SMALL, f"dataset.root={root}", f"data.num_workers={workers}", expect=2)
    refused(done, "no such image", "a.png")


@pytest.mark.slow
def test_a_truncated_image(e3va, root):
    path = root / "images" / "sub" / "b.jpg"
    path.write_bytes(path.read_bytes()[:600])
    done = e3va("train", *SMALL, f"dataset.root={root}", "data.num_workers=1", expect=2)
    refused(done, "b.jpg", "cannot read")
    report = e3va("check-data", *SMALL, f"dataset.root={root}", expect=1).stdout
    assert "b.jpg" in report


@pytest.mark.slow
def test_an_image_of_another_size(e3va, root):
    Image.new("RGB", (20, 20)).save(root / "images" / "a.png")
    refused(e3va("train", *SMALL, f"dataset.root={root}", "data.num_workers=0", expect=2), "a.png", "20x20", "40x30")


@pytest.mark.slow
def test_a_file_that_is_not_coco(e3va, root):
    (root / "instances.json").write_text("[1, 2]")
    refused(e3va("train", *SMALL, f"dataset.root={root}", expect=2), "instances.json")
    (root / "instances.json").write_text("{")
    refused(e3va("train", *SMALL, f"dataset.root={root}", expect=2), "instances.json")


def test_unusable_boxes_are_dropped_with_a_count(e3va, root, annotate):
    change(
        root,
        annotations=[
            annotate(1, [5, 5, 20, 15]),
            annotate(2, [5, 5, 0, 15]),
            annotate(3, [5, 5, 10, 10], category_id=99),
        ],
    )
    done = e3va("train", *SMALL, f"dataset.root={root}", "data.num_workers=0", "trainer.max_steps=1")
    assert "1 box without area" in done.stdout and "1 unknown category id" in done.stdout


@pytest.mark.slow
def test_nothing_usable(e3va, root, annotate):
    change(root, annotations=[annotate(1, [5, 5, 0, 15])])
    refused(e3va("train", *SMALL, f"dataset.root={root}", expect=2), "no usable object", "box without area: 1")


def test_a_head_with_masks_needs_masks(e3va, root, annotate):
    change(root, annotations=[annotate(1, [5, 5, 20, 15], segmentation=None)])
    refused(e3va("train", *SMALL, f"dataset.root={root}", expect=2), "is trained on masks", "head=retinanet")


@pytest.mark.slow
def test_missing_folders_say_what_is_there(e3va, root):
    done = e3va("train", *SMALL, f"dataset.root={root}", "dataset.train_images=picture", expect=2)
    refused(done, "picture", "images")


@pytest.fixture
def check(config, root, capsys):
    """What the command prints here of data that have problems."""

    def check(*words):
        with pytest.raises(SystemExit) as end:
            check_data.run(config(*SMALL, f"dataset.root={root}", *words, command="check_data"), folder=root)
        assert end.value.code == 1
        return capsys.readouterr().out

    return check


def test_what_training_would_refuse_is_a_problem(check, root):
    (root / "empty.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    out = check("dataset.train_annotations=empty.json", "dataset.val_annotations=empty.json")
    assert (
        out.count("Cannot be used for training: ") == 2 and "There are problems." in out and "No problems." not in out
    )


def test_the_classes_of_both_splits_are_compared(check, root):
    content = json.loads((root / "instances.json").read_text())
    categories = [{**one, "name": one["name"].replace("dog", "wolf")} for one in content["categories"]]
    (root / "val.json").write_text(json.dumps({**content, "categories": categories}))
    out = check("dataset.val_annotations=val.json")
    assert "Cannot be used for training: the classes of train and val differ; only in train: dog (id 3)" in out
