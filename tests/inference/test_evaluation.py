"""Evaluate several adapters together: the results of each by itself, and adapters that are refused."""

from __future__ import annotations

import pytest
import torch

from e3va_cli.config.composition import load_config
from e3va_cli.errors import UserError
from e3va_cli.evaluation.mean_iou import MeanIoU
from e3va_cli.export.adapter_checkpoint import load_trained_weights, read_checkpoint_or_adapter
from e3va_cli.inference.evaluation import MultiEvaluator, build_evaluation, group_by_image_size, read_eval_specs
from e3va_cli.models.heads import Segmentation
from e3va_cli.training.run import build_run
from tests.export.crafted_runs import SEGMENTER, SMALL, counted, craft

DATA = ["dataset.val_images=5", "data.val_batch_size=2", "trainer.accelerator=cpu"]
SIZE = ["dataset.val_short_side=96", "dataset.max_size=128"]
ADAPTERS = {
    "detector": [*SMALL, *DATA, "head.box.score_threshold=0.01"],
    "boxes": ["head=retinanet", "head.fpn_channels=32", "head.score_threshold=0.005", *SIZE, *DATA],
    "frozen": [*SMALL, *DATA, "head.box.score_threshold=0.01", "adapter=frozen"],
    "lora": [*SMALL, *DATA, "head.box.score_threshold=0.01", "adapter=lora", "adapter.rank=2"],
    "larger": [*SMALL[:1], *DATA, "head.box.score_threshold=0.01"],
    "fewer": [*SMALL, *DATA, "dataset.val_images=4", "trainer.precision=bf16-mixed"],
    "elsewhere": [*SMALL, *DATA, "backbone.seed=1"],
    "segmenter": [*SEGMENTER, *DATA[1:]],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed, (name, words) in enumerate(ADAPTERS.items()):
        craft(root / name, *words, seed=seed, tens=False)
    craft(root / "tens", *ADAPTERS["detector"])
    return root


def configured(*words):
    return load_config("evaluate", ["checkpoint=x", *words])


def eval_specs(runs, *names, given=()):
    configs = [configured(*ADAPTERS.get(name, ADAPTERS["detector"]), *given) for name in names]
    return read_eval_specs([str(runs / name) for name in names], configs)


def evaluate_one(run, config, folder):
    """Return the results and predictions of a run, evaluated by itself."""
    reference = build_run(config, folder, evaluate_only=True)
    load_trained_weights(reference.model, read_checkpoint_or_adapter(str(run), "checkpoint"))
    reference.trainer.validate(reference.lightning_module, reference.data, verbose=False)
    return reference.lightning_module.results, reference.lightning_module.evaluator.predictions


def test_results_are_those_of_each_by_itself(runs, tmp_path):
    names = ["lora", "detector", "larger", "boxes", "frozen"]
    groups = group_by_image_size(eval_specs(runs, *names))
    assert [[one.name for one in group] for group in groups] == [["lora", "detector", "boxes", "frozen"], ["larger"]]
    for group in groups:
        evaluation = build_evaluation(group, tmp_path / "together")
        backbone = evaluation.run.model.extractor.backbone
        with counted(backbone) as counts:
            evaluation.run.trainer.validate(evaluation.run.lightning_module, evaluation.run.data, verbose=False)
        assert counts == {"stem": 3, "block": 3}, "once for each of three batches"
        for one in group:
            results, found = evaluate_one(runs / one.name, one.config, tmp_path / one.name)
            assert evaluation.results[one.name] == results
            assert evaluation.evaluators[one.name].predictions == found and any(found.values()), "no predictions"
            assert ("mask" in results) == (one.name != "boxes")
        assert list(evaluation.results) == [one.name for one in group]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["detector", "segmenter"],
            "detector and segmenter .* dataset=shapes does not have .* for head=upernet of segmenter",
        ),
        (["segmenter", "boxes"], "segmenter and boxes .* dataset=ade20k does not have .* for head=retinanet of boxes"),
        (["detector", "fewer"], "dataset.val_images=5 and dataset.val_images=4, trainer.precision=32 and trainer.prec"),
        (["detector", "fewer"], "set dataset.val_images=, trainer.precision= for both"),
        (["detector", "tens"], "detector and tens .* different category ids"),
        (["detector", "elsewhere"], "different backbone weights: .*detector.*, .*elsewhere"),
    ],
)
def test_incomparable_adapters_are_refused(runs, names, says):
    with pytest.raises(UserError, match=says) as refused:
        eval_specs(runs, *names)
    assert len(refused.value.messages) == 1 and "\n" not in str(refused.value)


def test_overrides_make_adapters_comparable(runs):
    given = ["dataset.val_images=3", "trainer.precision=32", "dataset.val_short_side=64"]
    assert len(group_by_image_size(eval_specs(runs, "detector", "fewer", "larger", given=given))) == 1


def test_states_of_ranks_are_merged_by_name():
    def evaluators():
        return MultiEvaluator({name: MeanIoU(["sky", "road"]) for name in ("one", "other")})

    whole, *parts = (evaluators() for _ in range(3))
    for index in range(4):
        target = {"semantic": torch.randint(0, 3, (4, 6)), "original_size": (4, 6)}
        found = {name: Segmentation(torch.rand(2, 4, 6), (4, 6), (4, 6)) for name in ("one", "other")}
        for evaluator in (whole, parts[index % 2]):
            evaluator.update(found, target)
    states = [part.state() for part in parts]
    parts[0].merge(states)
    assert parts[0].num_images == whole.num_images == 4 and parts[0].compute() == whole.compute()
    assert whole.compute()["one"] != whole.compute()["other"]
    scores = whole.log_dict(whole.compute())
    assert scores["one/mIoU"] == whole.compute()["one"]["mIoU"] and whole.monitor in scores
    parts[0].reset()
    assert parts[0].num_images == 0
