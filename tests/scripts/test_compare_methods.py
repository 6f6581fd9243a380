"""The comparison of methods: its choice of learning rates and its table, and once the whole of it on crafted images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e3va_cli.errors import UserError
from scripts import compare_methods, comparison_report

EXPERIMENT = "camvid_upernet_swin_nano"
COST = {"trainable_params": 1_500_000, "estimated_peak_mib": 100.0, "step_time_s": 2.0}


def craft(root: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind, shape in (("images", (48, 64, 3)), ("annotations", (48, 64))):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for number in range(10):
                values = generator.integers(0, 256 if kind == "images" else 4, shape, dtype=np.uint8)
                Image.fromarray(values).save(folder / f"{number}.png")


def comparison(tmp_path, **options):
    arguments = {"seeds": [0, 1], "lrs": [1e-3, 1e-2], "scales": [1.0], "equal_time": True, **options}
    return compare_methods.Comparison(
        EXPERIMENT, [], methods=["frozen", "lora"], folder=tmp_path / EXPERIMENT, **arguments
    )


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of training: results grow with the learning rate, and LoRA's steps take twice as long as E3VA's."""
    trained = []

    def train_group(self, members):
        for member in members:
            trained.append(member)
            folder = self.folder / member.name
            folder.mkdir(parents=True)
            value = 0.5 + member.lr - 0.01 * member.seed
            (folder / "finished.json").write_text(json.dumps({"metric": "mIoU", "value": value}))

    costs = {"full": {**COST, "step_time_s": 4.0}, "e3va": COST, "frozen": COST, "lora": {**COST, "step_time_s": 4.0}}
    monkeypatch.setattr(compare_methods.Comparison, "train_group", train_group)
    monkeypatch.setattr(compare_methods.Comparison, "costs", lambda self: costs)
    monkeypatch.setattr(compare_methods.Comparison, "total_steps", lambda self: 30)
    return trained


def test_the_best_rates_go_on_and_finished_runs_are_not_repeated(tmp_path, stand_in):
    assert comparison(tmp_path).run()
    phases = [(m.phase, m.method, m.lr, m.max_steps) for m in stand_in]
    assert phases[:4] == [("search", method, lr, 10) for method in ("frozen", "lora") for lr in (1e-3, 1e-2)]
    assert {p for p in phases if p[0] == "steps"} == {("steps", method, 1e-2, 30) for method in ("frozen", "lora")}
    assert {p for p in phases if p[0] == "time"} == {("time", "lora", 1e-2, 15)}, "half of the steps in the same time"
    count = len(stand_in)
    assert comparison(tmp_path).run() and len(stand_in) == count
    content = json.loads((tmp_path / EXPERIMENT / "comparison.json").read_text())
    frozen, lora = sorted(comparison_report.rows(content))
    assert frozen == ["frozen", "1.50", "100", "0.50", "0.01", "0.01", "50.5 ± 0.7", "50.5 ± 0.7"]
    assert lora[3] == "1.00" and lora[6] == "50.5 ± 0.7"


def test_runs_with_other_overrides_are_not_mixed(tmp_path, stand_in):
    def with_overrides(*overrides):
        return replace(comparison(tmp_path), overrides=list(overrides))

    assert with_overrides("data.batch_size=4", "dataset.root=here").run()
    count = len(stand_in)
    assert with_overrides("data.batch_size=4", "dataset.root=there").run() and len(stand_in) == count
    with pytest.raises(UserError, match=r"has runs with data.batch_size=4; use another --output"):
        with_overrides("data.batch_size=8").run()


def test_no_report_without_finished_runs(tmp_path):
    comparison_report.write_report([{"runs": [], "costs": {}}], tmp_path, compare_methods.console)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "no such experiment"),
        ([EXPERIMENT, "--methods", "lorra"], "did you mean lora"),
        ([EXPERIMENT, "--lrs", "fast"], "separate numbers by commas"),
        ([EXPERIMENT, "seed=1"], "set by this script"),
        ([EXPERIMENT, "adapter.rank=x"], "adapter.rank=x"),
    ],
)
def test_invalid_arguments(words, says, capsys):
    assert compare_methods.main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_on_crafted_images(tmp_path, capsys):
    craft(tmp_path / "data")
    small = ["dataset.short_side=48", "dataset.crop_size=48", "dataset.num_classes=3", "schedule.epochs=3"]
    words = [EXPERIMENT, f"dataset.root={tmp_path / 'data'}", *small, "data.batch_size=4", "--seeds", "0"]
    words += [
        "--methods",
        "frozen,e3va,lora",
        "--lrs",
        "1e-3",
        "--adapter-lr-scales",
        "1,3",
        "--output",
        str(tmp_path / "out"),
    ]
    assert compare_methods.main(words) == 0
    table = (tmp_path / "out/comparison.md").read_text()
    assert all(f"| {method} " in table for method in ("frozen", "e3va", "lora"))
    assert (tmp_path / "out/comparison.png").is_file()
    capsys.readouterr()
    assert compare_methods.main(words) == 0
    assert "search" not in capsys.readouterr().out
