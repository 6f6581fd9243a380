"""`e3va predict`: predictions, output files, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image

import e3va_cli
from e3va_cli import load_adapter
from e3va_cli.commands import predict
from e3va_cli.config.composition import load_config
from e3va_cli.data.formats.shapes import Shapes
from e3va_cli.errors import UserError
from e3va_cli.inference.image_inputs import find_images
from tests.export.crafted_runs import SEGMENTER, craft

LOW = 0.06  # an almost untrained head is sure of nothing


@pytest.fixture(scope="module")
def runs(short_run, tmp_path_factory):
    """A detector of the real command, and a segmenter on the same backbone at the same image size."""
    root = tmp_path_factory.mktemp("runs")
    (root / "shapes").symlink_to(short_run)
    craft(root / "scenes", *SEGMENTER, "dataset.short_side=128")
    return root


@pytest.fixture
def photos(tmp_path):
    """Four images: two in a folder, two of the same stem in folders below it."""
    shapes = Shapes("val", images=4, size=128, seed=0)
    for index, name in enumerate(["one.png", "two.jpg", "x/one.png", "y/one.jpg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(shapes[index][0].permute(1, 2, 0).numpy())
        pixels.resize((160, 120) if index == 1 else (128, 128)).save(path)
    return tmp_path / "photos"


def run(*words):
    """What `e3va predict` writes."""
    cfg = load_config("predict", ["accelerator=cpu", *map(str, words)])
    predict.run(cfg)
    return json.loads((predict.Path(cfg.output) / "predictions.json").read_text())


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_the_real_command(e3va, runs, photos, tmp_path):
    done = e3va("predict", f"checkpoint={runs}/shapes", f"input={photos}", "output=found", f"score_threshold={LOW}")
    assert "2 images" in done.stdout and not done.stderr
    assert files(tmp_path) - files(tmp_path / "photos") == {
        *(f"photos/{name}" for name in files(photos)),
        *(f"found/{name}" for name in ("one.png", "two.png", "predictions.json")),
    }, "nothing else is left, such as folders of Hydra's"
    content = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert content["adapters"]["shapes"]["classes"] == ["circle", "square", "triangle", "star", "ring"]
    assert [image["file"] for image in content["images"]] == [f"{photos}/one.png", f"{photos}/two.jpg"]
    model = load_adapter(runs / "shapes").adapter.model
    pixels = torch.from_numpy(np.array(Image.open(photos / "one.png"))).permute(2, 0, 1)[None]
    expected = model.predict(pixels, [(128, 128)])[0].filter_by_score(LOW)
    detections = content["images"][0]["adapters"]["shapes"]["detections"]
    assert len(detections) == len(expected) > 0
    assert [one["score"] for one in detections] == expected.scores.tolist()
    assert [one["label"] for one in detections] == expected.labels.tolist()
    assert [one["box"] for one in detections] == expected.boxes.tolist()
    for one, mask in zip(detections, expected.paste_masks(), strict=True):
        assert (coco_mask.decode(one["mask"]) == mask.numpy()).all()
        assert one["class"] == content["adapters"]["shapes"]["classes"][one["label"] - 1]
    assert (content["images"][1]["width"], content["images"][1]["height"]) == (160, 120)


def test_results_equal_those_of_python(runs, photos, tmp_path):
    content = run(f"checkpoint={runs}/shapes", f"input={photos}", f"output={tmp_path}/a", f"score_threshold={LOW}")
    found = load_adapter(runs / "shapes", device="cpu").predict(sorted(photos.glob("*.*")), score_threshold=LOW)
    assert found[0].detections
    for image, one in zip(content["images"], found, strict=True):
        boxes = [tuple(d["box"]) for d in image["adapters"]["shapes"]["detections"]]
        assert boxes == [d.box for d in one.detections]
        masks = [d["mask"] for d in image["adapters"]["shapes"]["detections"]]
        assert masks == [d.rle for d in one.detections]


def test_python_saves_and_returns_the_same(runs, photos, tmp_path):
    options = (f"score_threshold={LOW}", "accelerator=cpu")
    found = e3va_cli.predict(runs / "shapes", [photos / "one.png"], *options, output=tmp_path / "it's")
    ((file, prediction),) = found.items()
    assert file == photos / "one.png" and prediction.detections
    (image,) = json.loads((tmp_path / "it's" / "predictions.json").read_text())["images"]
    boxes = [tuple(d["box"]) for d in image["adapters"]["shapes"]["detections"]]
    assert boxes == [d.box for d in prediction.detections]
    with pytest.raises(UserError, match="score is now called score_threshold"):
        e3va_cli.predict(runs / "shapes", photos, "score=0.3")


def test_the_threshold(runs, photos, tmp_path):
    words = [f"checkpoint={runs}/shapes", f"input={photos}/one.png", "save_images=false"]
    low, high = (run(*words, f"output={tmp_path}/{score}", f"score_threshold={score}") for score in (LOW, 1))
    scores = [one["score"] for one in low["images"][0]["adapters"]["shapes"]["detections"]]
    assert scores and min(scores) >= LOW and not high["images"][0]["adapters"]["shapes"]["detections"]
    assert files(tmp_path / "1") == {"predictions.json"}
    middle = sorted(scores)[len(scores) // 2]
    kept = run(*words, f"output={tmp_path}/middle", f"score_threshold={middle}")["images"][0]["adapters"]["shapes"][
        "detections"
    ]
    assert [one["score"] for one in kept] == [score for score in scores if score >= middle]


def test_several_adapters_give_what_each_gives_alone(runs, photos, tmp_path):
    both = f"[{runs}/shapes,{runs}/scenes]"
    pattern = f"input={photos}/**/*"
    content = run(f"checkpoint={both}", pattern, f"output={tmp_path}/both", f"score_threshold={LOW}")
    stems = ["one", "two", "one-2", "one-3"]
    assert files(tmp_path / "both") == {
        "predictions.json",
        *(f"shapes/{stem}.png" for stem in stems),
        *(f"scenes/{stem}.png" for stem in stems),
        *(f"scenes/labels/{stem}.png" for stem in stems),
    }
    for name in ("shapes", "scenes"):
        alone = run(f"checkpoint={runs}/{name}", pattern, f"output={tmp_path}/{name}", f"score_threshold={LOW}")
        for one, other, stem in zip(content["images"], alone["images"], stems, strict=True):
            ours, theirs = one["adapters"][name], other["adapters"][name]
            if name == "scenes":
                assert ours["segmentation"].pop("labels") == f"scenes/labels/{stem}.png"
                maps = [Image.open(tmp_path / f / "labels" / f"{stem}.png") for f in ("both/scenes", "scenes")]
                assert theirs["segmentation"].pop("labels") == f"labels/{stem}.png"
                assert maps[0].mode == "L" and np.array_equal(*map(np.asarray, maps))
                labels = np.asarray(maps[0])
                assert labels.shape == (one["height"], one["width"]) and set(labels.flat) <= {10, 20, 30}
                for share in ours["segmentation"]["shares"]:
                    assert share["share"] == (labels == share["value"]).mean()
                    assert share["value"] == 10 * share["label"], "masks are written as the data set writes them"
                    assert share["class"] == ["sky", "road", "tree"][share["label"] - 1]
            assert ours == theirs


def test_what_is_said_about_passes(runs, photos, tmp_path, capsys):
    craft(tmp_path / "lora", "adapter=lora", "adapter.rank=2", "backbone=swin_nano")
    checkpoints = f"checkpoint=[{runs}/shapes,{tmp_path}/lora,{runs}/scenes]"
    run(checkpoints, f"input={photos}/one.png", f"output={tmp_path}/a", "save_images=false")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("shapes, scenes: one shared backbone pass") for line in lines)
    assert any(line.startswith("lora: separate backbone, as adapter=lora changes its features") for line in lines)


def test_a_photo_is_predicted_as_a_viewer_shows_it(runs, photos, tmp_path):
    lying, exif = Image.open(photos / "two.jpg").rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # by a quarter turn to the right
    lying.save(photos / "lying.png", exif=exif)
    Image.open(photos / "two.jpg").save(photos / "two.png")
    words = [f"checkpoint={runs}/shapes", f"input=[{photos}/lying.png,{photos}/two.png]", f"score_threshold={LOW}"]
    turned, upright = run(*words, f"output={tmp_path}/found")["images"]
    assert (turned["width"], turned["height"]) == (upright["width"], upright["height"]) == (160, 120)
    assert turned["adapters"] == upright["adapters"] and upright["adapters"]["shapes"]["detections"]
    assert turned["exif_orientation"] == 6 and "as displayed" in turned["pixels"]
    assert "exif_orientation" not in upright
    drawn = [np.asarray(Image.open(tmp_path / "found" / name)) for name in ("lying.png", "two.png")]
    assert np.array_equal(*drawn)


def test_unreadable_files_are_skipped(runs, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes((photos / "two.jpg").read_bytes()[:500])
    (photos / "none.png").write_text("no image")
    with pytest.raises(SystemExit) as end:
        run(f"checkpoint={runs}/shapes", f"input={photos}", "batch_size=2", f"output={tmp_path}/found")
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1
    assert len(lines) == 3 and "broken.jpg" in lines[0] and "none.png" in lines[1] and "2 of 4 files" in lines[2]
    content = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert [image["file"] for image in content["images"]] == [f"{photos}/one.png", f"{photos}/two.jpg"]
    assert [skipped["file"] for skipped in content["skipped"]] == [f"{photos}/broken.jpg", f"{photos}/none.png"]
    assert files(tmp_path / "found") == {"one.png", "two.png", "predictions.json"}


def test_nothing_to_do_is_exit_code_2(e3va, runs, tmp_path):
    done = e3va("predict", f"checkpoint={runs}/shapes", "input=[nowhere.jpg,'*.png',.]", expect=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and "no such file" in lines[0] and "matches no file" in lines[1] and "no images" in lines[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["checkpoint=[]"], "at least one"),
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such"),
        (["input=[]"], "no input"),
        (["backbone.weights=none.pth"], "no such file: none.pth"),
    ],
)
def test_refusals(runs, photos, tmp_path, words, says):
    with pytest.raises(UserError, match=says.replace("[", r"\[")) as caught:
        run(f"checkpoint={runs}/shapes", f"input={photos}", f"output={tmp_path}/found", *words)
    assert len(caught.value.messages) == 1 and "\n" not in str(caught.value) and not (tmp_path / "found").exists()


def test_other_backbones_are_refused(runs, photos, tmp_path):
    craft(tmp_path / "other", "backbone.seed=7", "backbone=swin_nano")
    with pytest.raises(UserError) as caught:
        run(f"checkpoint=[{runs}/shapes,{tmp_path}/other]", f"input={photos}", f"output={tmp_path}/found")
    assert len(caught.value.messages) == 1 and "shapes" in str(caught.value) and "other" in str(caught.value)


def test_nothing_is_overwritten(runs, photos, tmp_path):
    words = [f"checkpoint={runs}/shapes", f"input={photos}"]
    before = (photos / "one.png").read_bytes()
    with pytest.raises(UserError, match=r"one\.png exists already"):
        run(*words, f"output={photos}")
    assert (photos / "one.png").read_bytes() == before and files(photos) == {
        "one.png",
        "two.jpg",
        "x/one.png",
        "y/one.jpg",
    }
    run(*words, f"output={tmp_path}/found")
    with pytest.raises(UserError, match=r"predictions\.json exists already"):
        run(*words, f"output={tmp_path}/found")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create the folder"):
        run(*words, f"output={tmp_path}/file")


def test_a_folder_is_made_where_none_is_given(runs, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(TypeError):  # the test's own reading of output=null, when the command is done
            run(f"checkpoint={runs}/shapes", f"input={photos}/one.png")
    made = sorted((tmp_path / "runs").iterdir())
    assert len(made) == 2 and all(files(folder) == {"one.png", "predictions.json"} for folder in made)


def test_inputs(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / ".hidden.png").touch()
    (photos / "notes.txt").touch()
    (photos / "a[1].png").write_bytes((photos / "one.png").read_bytes())

    def names(*inputs):
        return [str(path) for path in find_images(inputs)]

    assert names(".") == ["a[1].png", "one.png", "two.jpg"]
    assert names("*.png", "x", "one.png", str(photos / "one.png")) == ["a[1].png", "one.png", "x/one.png"]
    assert names("**/*.jpg") == ["two.jpg", "y/one.jpg"]
    assert names("a[1].png") == ["a[1].png"], "a file of that name is no pattern"
    assert names("notes.txt") == ["notes.txt"], "what is given by name is tried"


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def exit_with_error(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "iterdir", exit_with_error)
    with pytest.raises(UserError, match=r": the folder cannot be read \(Permission denied\)"):
        find_images([str(tmp_path)])


def test_label_maps_of_many_classes_have_16_bits(tmp_path):
    from e3va_cli.inference.prediction import ImagePrediction
    from e3va_cli.inference.prediction_writer import PredictionWriter

    labels = np.array([[1, 255, 256, 300]], dtype=np.int16)
    about = {"name": "a", "task": "segmentation", "path": "p", "classes": [], "category_ids": list(range(1, 301))}
    adapter = type("Adapter", (), about)
    output = PredictionWriter(tmp_path, [tmp_path / "x.jpg"], [adapter], score_threshold=0, save_images=False)
    classes = tuple(map(str, range(1, 301)))
    output.add(0, {"a": ImagePrediction(np.zeros((1, 4, 3), np.uint8), 4, 1, classes, labels=labels)})
    assert np.asarray(Image.open(tmp_path / "labels" / "x.png")).tolist() == labels.tolist()
