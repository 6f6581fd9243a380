from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms.v2.functional import resize

import e3va_cli
from e3va_cli.errors import UserError
from e3va_cli.inference.images import to_image
from e3va_cli.inference.loaded_adapter import unique_names
from e3va_cli.inference.prediction import Detection, ImagePrediction
from e3va_cli.inference.predictor import Predictor, load_adapter, load_adapters
from e3va_cli.inference.shared_backbone import predict_shared
from tests.conftest import QUICK
from tests.export.crafted_runs import SEGMENTER, SMALL, counted, craft

SCORE = 0.2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of: two detectors, a segmenter, one without adapters, one of each kind that does not share a pass."""
    root = tmp_path_factory.mktemp("runs")
    retinanet = ["head=retinanet", "head.fpn_channels=32", "head.score_threshold=0.005"]
    craft(root / "detector", *SMALL)
    craft(root / "boxes", *retinanet, "dataset.val_short_side=96", "dataset.max_size=128", seed=1)
    craft(root / "segmenter", *SEGMENTER, seed=2)
    craft(root / "frozen", *SMALL, "adapter=frozen", seed=3)
    craft(root / "lora", *SMALL, "adapter=lora", "adapter.rank=4", seed=4)
    craft(root / "full", *SMALL, "adapter=full", seed=5)
    craft(root / "windows", *SEGMENTER, "head.slide_window=64", "head.slide_stride=40", seed=6)
    craft(root / "larger", *SMALL, "dataset.max_size=160", "dataset.val_short_side=144", seed=7)
    craft(root / "elsewhere", *SMALL, "backbone.seed=1", seed=8)
    return root


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An image file of 200 x 150 pixels."""
    path = tmp_path_factory.mktemp("images") / "a.png"
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), (150, 200), mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy()).save(path)
    return path


def same(one: ImagePrediction, other: ImagePrediction) -> bool:
    labels = (one.labels is None and other.labels is None) or np.array_equal(one.labels, other.labels)
    return labels and one.detections == other.detections and one.classes == other.classes


def tensors_of(found):
    return [value for value in vars(found).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("order", [1, -1])
def test_one_pass_gives_what_separate_passes_give(runs, order):
    names = ["detector", "segmenter", "frozen", "boxes"][::order]
    together = load_adapters([runs / name for name in names])
    models = [adapter.model for adapter in together.adapters]
    images, sizes = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8), [(96, 128), (80, 100)]
    separate = [model.predict(images, sizes) for model in models]
    with counted(models[0].extractor.backbone) as counts:
        ours = predict_shared(models, images, sizes)
    assert counts == {"stem": 1, "block": 1}
    for name, found, expected in zip(names, ours, separate, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert len(tensors_of(one)) and all(map(torch.equal, tensors_of(one), tensors_of(other))), name
            assert name == "segmenter" or len(one), f"{name} finds nothing, so nothing was compared"


def test_a_detector_and_a_segmenter_share_one_backbone_and_its_pass(runs, picture):
    names = ["detector", "segmenter", "frozen"]
    together = load_adapters([runs / name for name in names])
    backbones = {id(adapter.model.extractor.backbone) for adapter in together.adapters}
    assert len(backbones) == 1 and [len(adapters) for adapters in together.passes] == [3]
    with counted(together.adapters[0].model.extractor.backbone) as counts:
        found = together.predict(picture, score_threshold=SCORE)
    assert counts == {"stem": 1, "block": 1} and list(found) == names
    for name in names:
        alone = load_adapter(runs / name).predict(picture, score_threshold=SCORE)
        assert same(found[name], alone) and (alone.labels is not None or alone.detections)


def test_what_cannot_share_a_pass_runs_by_itself(runs, picture):
    names = ["lora", "detector", "windows", "full", "larger", "segmenter"]
    together = load_adapters([runs / name for name in names])
    adapters = {adapter.name: adapter for adapter in together.adapters}
    assert [[a.name for a in shared] for shared in together.passes] == [
        ["lora"],
        ["detector", "segmenter"],
        ["windows"],
        ["full"],
        ["larger"],
    ]
    assert (
        "adapter=lora" in adapters["lora"].exclusive_reason and "sliding window" in adapters["windows"].exclusive_reason
    )
    backbones = {name: adapter.model.extractor.backbone for name, adapter in adapters.items()}
    assert backbones["windows"] is backbones["detector"] is backbones["segmenter"] is backbones["larger"]
    assert len({id(backbone) for backbone in backbones.values()}) == 3
    found = together.predict([picture, picture], score_threshold=SCORE, batch_size=2)[1]
    for name in names:
        (alone,) = load_adapter(runs / name).predict([picture, picture], score_threshold=SCORE, batch_size=2)[1:]
        assert same(found[name], alone), name


def test_other_backbones_are_refused_with_the_names_of_both(runs):
    with pytest.raises(UserError) as caught:
        load_adapters([runs / "detector", runs / "elsewhere"], option="checkpoint")
    (line,) = caught.value.messages
    assert "\n" not in line and str(runs / "detector") in line and str(runs / "elsewhere") in line


def test_weights_of_another_backbone_are_refused(runs, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(load_adapter(runs / "elsewhere").adapter.model.extractor.backbone.model.state_dict(), path)
    with pytest.raises(UserError, match="other weights"):
        load_adapter(runs / "detector", weights=str(path))
    own = load_adapter(runs / "elsewhere", weights=str(path)).adapter.model.identity
    assert own.weights == "file"


def test_objects_are_in_pixels_of_the_image(runs, picture):
    predictor = load_adapter(runs / "detector")
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)
    scale = min(96 / 150, 128 / 200)
    seen = resize(pixels, [int(150 * scale), int(200 * scale)], antialias=True)
    height, width = seen.shape[1:]
    padded = torch.zeros(3, 96, 128, dtype=torch.uint8)
    padded[:, :height, :width] = seen
    expected = predictor.adapter.model.predict(padded[None], [(height, width)])[0]
    kept = expected.scores >= SCORE
    found = predictor.predict(picture, score_threshold=SCORE)
    assert (found.width, found.height) == (200, 150) and 0 < len(found.detections) == int(kept.sum()) < len(kept)
    assert [one.score for one in found.detections] == expected.scores[kept].tolist()
    assert [one.label for one in found.detections] == expected.labels[kept].tolist()
    boxes = expected.boxes[kept] * torch.tensor([200 / width, 150 / height] * 2)
    assert torch.allclose(torch.tensor([one.box for one in found.detections]), boxes, atol=1e-3)
    masks = paste_masks_in_image(expected.masks[kept], boxes, (150, 200))[:, 0] > 0.5
    assert masks.any()
    for one, mask in zip(found.detections, masks, strict=True):
        assert (one.mask != mask.numpy()).sum() <= 2, "but for the rounding of a box"
        assert one.name == predictor.classes[one.label - 1] and one.category_id == 10 * one.label
        assert isinstance(one.rle["counts"], str) and coco_mask.area(one.rle) == one.mask.sum()


def test_a_segmentation_is_of_the_size_of_the_image(runs, picture):
    predictor = load_adapter(runs / "segmenter")
    found = predictor.predict(picture)
    assert found.labels.shape == (150, 200) and found.labels.dtype == np.int16 and not found.detections
    scale = min(96 / 150, 128 / 200)
    size = [int(150 * scale), int(200 * scale)]
    pixels = resize(to_image(picture), size, antialias=True)
    padded = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    padded[0, :, : size[0], : size[1]] = pixels
    scores = predictor.adapter.model.predict(padded, [tuple(size)])[0].scores[None]
    scores = interpolate(scores, (96, 128), mode="bilinear")[:, :, : size[0], : size[1]]
    expected = interpolate(scores, (150, 200), mode="bilinear")[0].argmax(0) + 1
    assert (found.labels == expected.numpy()).mean() > 0.9999
    assert found.shares == {k: (found.labels == k).mean() for k in np.unique(found.labels)}
    assert sum(found.shares.values()) == pytest.approx(1)


def test_kinds_of_images(runs, picture):
    predictor = load_adapter(runs / "detector")
    image = Image.open(picture)
    array = np.array(image)
    kinds = [picture, str(picture), image, array, torch.from_numpy(array).permute(2, 0, 1), image.convert("RGBA")]
    first, *others = predictor.predict(kinds, score_threshold=SCORE)
    assert isinstance(first, ImagePrediction) and first.detections and isinstance(first.detections[0], Detection)
    assert len(others) == 5 and all(same(first, other) for other in others)
    assert predictor.predict([]) == []
    with pytest.raises(AttributeError):
        first.width = 3


def test_grey_and_palette_images_are_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for given in (grey, Image.fromarray(grey), Image.fromarray(grey).convert("P")):
        assert torch.equal(to_image(given), torch.from_numpy(grey).expand(3, 3, 4)), type(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        (torch.zeros(3, 4, 4), "float32"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(4, 4, 3\)"),
        (np.zeros((4, 4), np.int64), "int64"),
        ("nowhere.png", "no such image"),
        (7, "int is not an image"),
    ],
)
def test_what_is_no_image_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        to_image(given)


def test_pictures(runs, picture):
    found = load_adapters([runs / "detector", runs / "segmenter"]).predict(picture, score_threshold=SCORE)
    drawn = np.array(found["detector"].draw())
    assert drawn.shape == (300, 400, 3), "a small image is drawn twice as large"
    assert (drawn != np.array(Image.open(picture)).repeat(2, 0).repeat(2, 1)).any(-1).mean() > 0.01
    assert found["segmenter"].draw().width == 400 and found["segmenter"].draw().height > 300, "the legend is below"
    large = ImagePrediction(np.zeros((40, 4000, 3), np.uint8), 4000, 40, ("a",), found["detector"].detections[:0])
    assert large.draw().size == (1600, 16)


def test_a_large_picture_is_drawn_smaller_with_its_objects_in_place():
    mask = np.zeros((1000, 3200), np.uint8, order="F")
    mask[400:600, 1600:2400] = 1
    rle = coco_mask.encode(mask)
    one = Detection(1, "a", 1, 0.9, (1600.0, 400.0, 2400.0, 600.0), {**rle, "counts": rle["counts"].decode()})
    found = ImagePrediction(np.zeros((1000, 3200, 3), np.uint8), 3200, 1000, ("a",), (one,))
    drawn = np.array(found.draw()).any(-1)
    assert drawn.shape == (500, 1600) and drawn[200:300, 800:1200].mean() > 0.99
    outside = drawn.copy()
    outside[150:310, 790:1210] = False
    assert not outside.any()


def test_names_never_meet():
    assert unique_names(["a", "A", "b", "a", "a-2"]) == ["a", "A-2", "b", "a-3", "a-2-2"]
    assert len(set(unique_names(["x"] * 500))) == 500


def test_the_same_run_twice(runs):
    paths = [runs / "detector", runs / "detector", runs / "detector" / "checkpoints" / "last.ckpt"]
    assert [a.name for a in load_adapters(paths).adapters] == ["detector", "detector-2", "detector-last"]


def test_the_package_offers_it_without_importing_torch():
    code = (
        "import sys, e3va_cli\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from e3va_cli import load_adapter\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert e3va_cli.load_adapter is load_adapter and e3va_cli.Predictor is Predictor
    assert all(getattr(e3va_cli, name) for name in e3va_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        e3va_cli.nothing  # noqa: B018


def test_every_line_of_the_documentation(runs, picture, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, run in (("my-adapter", "detector"), ("my-segmenter", "segmenter")):
        Path(name).symlink_to(runs / run)
    for name in ("photo.jpg", "other.png"):
        Path(name).write_bytes(picture.read_bytes())
    quick = ", ".join(f'"{word}"' for word in QUICK)
    for written, here in {
        '"dataset=coco", "dataset.root=DATA", "backbone=swin_t", "backbone.pretrained=true"': quick,
        "trainer.max_epochs=24": "trainer.max_epochs=2",
        '"dataset.root=OTHER"': '"data.val_batch_size=1"',
    }.items():
        assert written in blocks[0]
        blocks[0] = blocks[0].replace(written, here)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6 and Path("prediction.png").is_file() and len(names["predictions"]) == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_predictions_are_computed_in_the_runs_precision(precision, picture, tmp_path):
    """As an evaluation computes them; on a CPU 16-mixed is bfloat16 too."""
    run = craft(tmp_path / "half", *SMALL, f"trainer.precision={precision}", "head.box.score_threshold=0.01")
    exact = craft(tmp_path / "exact", *SMALL, "head.box.score_threshold=0.01")
    together, other = load_adapters([run], device="cpu"), load_adapters([exact], device="cpu")
    (adapter,) = together.adapters
    raw, _ = adapter.resize(to_image(picture), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (expected,) = adapter.model.predict(raw[None], [tuple(raw.shape[-2:])])
    scores = sorted(d.score for d in together.predict(picture, score_threshold=0.01)["half"].detections)
    assert scores == pytest.approx(sorted(expected.scores.tolist())[-len(scores) :]) and scores
    assert scores != sorted(d.score for d in other.predict(picture, score_threshold=0.01)["exact"].detections)


def test_runs_of_different_precisions_do_not_share_a_pass(tmp_path):
    one = craft(tmp_path / "one", *SMALL, "trainer.precision=bf16-mixed")
    together = load_adapters([one, craft(tmp_path / "other", *SMALL)], device="cpu")
    assert [[adapter.name for adapter in adapters] for adapters in together.passes] == [["one"], ["other"]]
