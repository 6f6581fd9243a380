import json

import numpy as np
import pycocotools.mask as rle
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_cli.data.formats.shapes import Shapes
from e3va_cli.evaluation.average_precision import AveragePrecision
from e3va_cli.evaluation.mean_iou import MeanIoU
from e3va_cli.evaluation.prediction_store import write_detections
from e3va_cli.evaluation.voc_average_precision import VocAveragePrecision, area_under_curve
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.visualization.precision_recall import RECALL, PrecisionRecall, plot_precision_recall

IDS = [3, 7, 8, 20, 90]


@pytest.fixture(scope="module")
def truth():
    found = Shapes("val", images=8, size=128, seed=0).ground_truth()
    for annotation in found["annotations"]:
        annotation["category_id"] = IDS[annotation["category_id"] - 1]
    for category, number in zip(found["categories"], IDS, strict=True):
        category["id"] = number
    return found


def findings():
    """Noisy boxes and masks, in an image of half the size, with some wrong classes."""
    dataset = Shapes("val", images=8, size=128, seed=0)
    for index in range(8):
        _, target = dataset[index]
        boxes = torch.cat([target["boxes"], target["boxes"]]).float()
        boxes = (boxes + torch.randn(boxes.shape).clamp(-2, 2)).clamp(0, 128)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1).clamp(0, 128)
        labels = torch.cat([target["labels"], torch.randint(1, 6, target["labels"].shape)])
        masks = torch.rand(len(boxes), 1, 28, 28) * 0.5 + 0.42
        yield Detections(boxes / 2, torch.rand(len(boxes)), labels, masks, (64, 64)), target


def official(truth, path, kind, tmp_path):
    """pycocotools on the two files alone."""
    (tmp_path / "truth.json").write_text(json.dumps(truth, default=bytes.decode))
    reference = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(reference, reference.loadRes(str(path)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_detections_give_pycocotools_the_same_results(truth, tmp_path):
    metric = AveragePrecision(truth, IDS, ("box", "mask"))
    for found, target in findings():
        metric.update(found, target)
    results = metric.compute()
    files = metric.save(tmp_path)
    assert set(files) == {"detections.json", "precision_recall.png"} == {p.name for p in tmp_path.iterdir()}
    for kind, iou in (("box", "bbox"), ("mask", "segm")):
        evaluation = official(truth, tmp_path / "detections.json", iou, tmp_path)
        for index, name in enumerate(("AP", "AP50", "AP75")):
            assert results[kind][name] == pytest.approx(evaluation.stats[index], abs=1e-6)
        assert 0.1 < results[kind]["AP50"] < 0.95
        np.testing.assert_allclose(metric.curves[kind].precision, evaluation.eval["precision"][0, :, :, 0, -1].T)
        assert np.mean(metric.curves[kind].average) == pytest.approx(evaluation.stats[1], abs=1e-6)


def test_detections_of_voc(truth, tmp_path):
    metric = VocAveragePrecision(truth, IDS, rule=area_under_curve)
    for found, target in findings():
        metric.update(found, target)
    value = metric.compute()["box"]["AP50"]
    metric.save(tmp_path)
    evaluation = official(truth, tmp_path / "detections.json", "bbox", tmp_path)
    assert value == pytest.approx(evaluation.stats[1], abs=0.03)  # COCO's rule is another one: 101 points of the curve
    first = json.loads((tmp_path / "detections.json").read_text())[0]
    assert set(first) == {"image_id", "category_id", "score", "bbox"} and first["category_id"] in IDS


def test_the_curve_of_voc_is_cocos(truth, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "e3va_cli.evaluation.prediction_store.plot_precision_recall", lambda kinds, path: drawn.update(kinds)
    )
    voc, coco = VocAveragePrecision(truth, IDS, rule=area_under_curve), AveragePrecision(truth, IDS, ("box",))
    # Boxes as annotated, on the objects of others too: both definitions match them the same way.
    for found, target in findings():
        exact = torch.cat([target["boxes"], target["boxes"]]).float()
        exact = Detections(exact, found.scores, found.labels, None, (128, 128))
        voc.update(exact, target)
        coco.update(exact, target)
    coco.compute()
    voc.save(tmp_path)
    np.testing.assert_allclose(drawn["box"].precision, coco.curves["box"].precision, atol=1e-9)


def test_no_detections_write_an_empty_list_and_a_plot(truth, tmp_path):
    metric = AveragePrecision(truth, IDS, ("box",))
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), None, (128, 128))
    metric.update(nothing, {"image_id": 1, "original_size": (128, 128)})
    metric.compute()
    metric.save(tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert Image.open(tmp_path / "precision_recall.png").size[0] > 300


def test_masks_are_text(tmp_path):
    mask = np.zeros((6, 5), dtype=np.uint8, order="F")
    mask[1:3, 2:4] = 1
    write_detections([{"image_id": 1, "segmentation": rle.encode(mask)}], tmp_path / "a.json")
    (read,) = json.loads((tmp_path / "a.json").read_text())
    assert isinstance(read["segmentation"]["counts"], str)
    assert (rle.decode(read["segmentation"]) == mask).all()


@pytest.mark.parametrize("count", [1, 12, 80])
def test_a_line_for_each_class_and_one_for_the_mean(count, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **o: lines.append((y, o)) or plot(axes, x, y, **o))
    precision = np.random.default_rng(0).random((count, len(RECALL)))
    curves = PrecisionRecall(
        [f"class {k}" for k in range(count)] + ["absent"], np.vstack([precision, -np.ones(101)]), []
    )
    averages = [float(row.mean()) for row in precision]
    plot_precision_recall(
        {"box": PrecisionRecall(curves.names, curves.precision, [*averages, None])}, tmp_path / "a.png"
    )
    assert len(lines) == count + 1, "no line for the class that is absent"
    np.testing.assert_allclose(lines[-1][0], precision.mean(0))
    assert f"{100 * np.mean(averages):.1f}" in lines[-1][1]["label"]


def test_names_are_no_mathematics(tmp_path):
    plot_precision_recall({"box": PrecisionRecall([r"$\nothing$"], np.ones((1, 101)), [1.0])}, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"


def drawn_matrix(monkeypatch):
    from matplotlib.axes import Axes

    shown = {}
    show = Axes.imshow

    def spy(axes, values, **options):
        shown["values"], shown["axes"] = np.array(values), axes
        return show(axes, values, **options)

    monkeypatch.setattr(Axes, "imshow", spy)
    return shown


def test_confusion_is_percent_of_each_row(tmp_path, monkeypatch):
    shown = drawn_matrix(monkeypatch)
    metric = MeanIoU(["sky", "road", "cost $5"])
    scores = torch.zeros(3, 2, 4)
    scores[0] = 1  # all is taken for sky,
    scores[1, 1, 2:] = 2  # but for two pixels of road
    semantic = torch.tensor([[1, 1, 1, 0], [2, 2, 2, 2]], dtype=torch.int16)
    target = {"semantic": semantic, "original_size": (2, 4)}
    metric.update(Segmentation(scores, (2, 4), (2, 4)), target)
    assert metric.save(tmp_path) == {"confusion.png": "confusion matrix"}
    np.testing.assert_allclose(shown["values"], [[100, 0, 0], [50, 50, 0], [np.nan] * 3])
    assert [tick.get_text() for tick in shown["axes"].get_yticklabels()] == ["sky", "road", r"cost \$5"]
    assert {text.get_text() for text in shown["axes"].texts} == {"100", "50"}
    assert Image.open(tmp_path / "confusion.png").format == "PNG"


def test_confusion_of_many_classes_grows(tmp_path):
    metric = MeanIoU([f"class {k}" for k in range(150)])
    metric.matrix += torch.eye(150, dtype=torch.int64)
    metric.save(tmp_path)
    assert min(Image.open(tmp_path / "confusion.png").size) > 150 * 15, "a class has the height of its name"
