"""The reproduction script: with crafted run folders and a stand-in for `e3va train`, and once with the real one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from e3va_cli.paper.published import ACCURACY, EXPERIMENTS
from scripts import reproduce

VERSIONS = {"python": "3.12.1", "torch": "2.11.0"}
GPU = "Some GPU"


def values(words: Sequence[str]) -> dict[str, Any]:
    """Overrides as Hydra reads them."""
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(words))}


def craft(
    folder: Path,
    words: Sequence[str],
    metrics: dict[str, Any] | str | None = None,
    resources: dict[str, Any] | None = None,
    finished: bool = True,
) -> Path:
    """What a run leaves; `metrics` as text is written as it is."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / ".hydra").mkdir(exist_ok=True)
    task = [word for word in words if not word.startswith("hydra.")]
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(task)))
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
    known = {"device_name": GPU, "devices": 1, "versions": VERSIONS, "trainable_backbone_params": 1_195_008}
    (folder / "resources.json").write_text(json.dumps(known | (resources or {})))
    if finished:
        (folder / "finished.json").write_text("{}")
    return folder


class Trainer:
    """Stands for `e3va train`: notes its words, leaves a run, and does what `ends` says for a method and seed."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ends: dict[tuple[str, int], int | type[BaseException] | str] = {}

    def __call__(self, command: Sequence[str]) -> int:
        assert list(command[:4]) == [sys.executable, "-m", "e3va_cli", "train"]
        words = values(command[4:])
        self.started.append(words)
        end = self.ends.get((words["adapter"], words["seed"]), 0)
        if isinstance(end, type):
            raise end
        if end == 0:
            craft(Path(words["hydra.run.dir"]), command[4:], {"box": {"AP50": 0.5}}, finished=False)
        return 0 if end == "stopped" else int(end)

    def names(self) -> list[tuple[str, int]]:
        return [(words["adapter"], words["seed"]) for words in self.started]


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


Call = Callable[..., int]


@pytest.fixture
def call(tmp_path: Path, trainer: Trainer) -> Call:
    """The command in the VOC setting, with data and output in the test's folder."""
    (tmp_path / "data").mkdir()

    def run(*words: str, experiment: str = "voc_retinanet_swin_l", root: str = "data") -> int:
        places = ["--root", str(tmp_path / root), "--output", str(tmp_path / "out")]
        return reproduce.main([experiment, *places, *words], trainer)

    return run


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def method(tmp_path: Path, name: str) -> dict[str, Any]:
    return next(m for m in results(tmp_path)["methods"] if m["method"] == name)


# Arguments


@pytest.mark.parametrize("experiment", ACCURACY)
def test_published_accuracies_are_those_of_the_documentation(experiment: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    row = next(line for line in page.read_text().splitlines() if line.startswith(f"| `{experiment}`"))
    pairs = re.findall(r"([0-9.]+) / ([0-9.]+)", row.split("|")[3])
    found = [(float(e3va), float(full)) for e3va, full in pairs]
    assert found == [(scores["e3va"], scores["full"]) for scores in ACCURACY[experiment].values()]


def test_a_dry_run_prints_every_command_and_does_nothing(call, trainer, tmp_path, capsys) -> None:
    assert call("--dry-run", "--methods", "e3va,lora", "--seeds", "0,7", "data.batch_size=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "Run 1 of 4: e3va, seed 0: starting",
        "Run 2 of 4: e3va, seed 7: starting",
        "Run 3 of 4: lora, seed 0: starting",
        "Run 4 of 4: lora, seed 7: starting",
    ]
    commands = [shlex.split(line) for line in lines if line.startswith(" ")]
    assert all(command[:4] == [sys.executable, "-m", "e3va_cli", "train"] for command in commands)
    assert [values(command[4:]) for command in commands] == [
        {
            "experiment": "voc_retinanet_swin_l",
            "adapter": name,
            "seed": seed,
            "dataset.root": str(tmp_path / "data"),
            "backbone.pretrained": True,
            "data.batch_size": 1,
            "hydra.run.dir": str(tmp_path / "out" / name / f"seed_{seed}"),
        }
        for name in ("e3va", "lora")
        for seed in (0, 7)
    ]
    assert not trainer.started and not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_experiment_has_its_metrics(call, tmp_path, experiment) -> None:
    assert call("--seeds", "0", "--methods", "e3va", experiment=experiment) == 0
    expected = {"coco": ["box_AP", "mask_AP"], "voc": ["box_AP50"], "ade20k": ["mIoU"]}[experiment.split("_")[0]]
    found = results(tmp_path)
    assert found["experiment"] == experiment and found["metrics"] == expected
    published = found["methods"][0]["published"]
    has_table = experiment != "coco_cascade_swin_l"
    assert all((published[name] is not None) == has_table for name in (*expected, "trainable_backbone_params"))
    with_memory = experiment in ("coco_cascade_swin_b", "voc_retinanet_swin_l")
    assert (published["peak_memory_allocated_mib_saved_pct"] is not None) == with_memory


@pytest.mark.parametrize("word", ["backbone.pretrained=false", "backbone.weights=/some/file.pth"])
def test_weights_can_be_overridden(call, trainer, word) -> None:
    call("--seeds", "0", "--methods", "e3va", word)
    assert {k: v for k, v in trainer.started[0].items() if k.startswith("backbone")} == values([word])


def test_unusual_folders_are_quoted(trainer, tmp_path) -> None:
    root, output = tmp_path / "it's, my=data", tmp_path / "two {words}"
    root.mkdir()
    words = ["voc_retinanet_swin_l", "--root", str(root), "--output", str(output), "--methods", "e3va", "--seeds", "0"]
    assert reproduce.main(words, trainer) == 0
    assert trainer.started[0]["dataset.root"] == str(root)
    assert (output / "e3va" / "seed_0" / "finished.json").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "lorra"], "no such adapter; did you mean adapter=lora?"),
        (["--seeds", "0,x"], "--seeds 0,x: expected integers"),
        (["--seeds", "0,-1"], "--seeds 0,-1: expected integers"),
        (["optimizer.lr=1e-4,1e-5"], "optimizer.lr=1e-4,1e-5: one value at a time"),
        (["seed=3"], "seed=3: set by this script"),
        (["adapter=lora"], "adapter=lora: set by this script"),
        (["backbone=swin_t", "+backbone.model_args.embed_dim=32"], "there are no published weights for swin_t"),
        (["--gather-only"], "no finished run"),
    ],
)
def test_invalid_arguments_are_one_line(call, trainer, capsys, words, says) -> None:
    assert call("--methods", "e3va", *words) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and error.startswith("reproduce.py: error: ") and "\n" not in error
    assert not trainer.started


def test_missing_experiment_or_folder(call, trainer, capsys) -> None:
    assert call(experiment="voc_retinanet") == 2
    assert (
        f"voc_retinanet: no such experiment of the paper; choices: {', '.join(sorted(EXPERIMENTS))}"
        in capsys.readouterr().err
    )
    assert call(root="nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not trainer.started


# Runs


def test_finished_runs_are_skipped(call, trainer, tmp_path, capsys) -> None:
    assert call("--seeds", "0,1") == 0, "e3va and full, unless said otherwise"
    assert trainer.names() == [("e3va", 0), ("e3va", 1), ("full", 0), ("full", 1)]
    assert "e3va train " in json.loads((tmp_path / "out/e3va/seed_0/finished.json").read_text())["command"]
    capsys.readouterr()
    assert call("--seeds", "0,1,2", "--methods", "e3va") == 0
    assert trainer.names()[4:] == [("e3va", 2)]
    assert "Run 1 of 3: e3va, seed 0: finished\n" in capsys.readouterr().out
    found = results(tmp_path)
    assert {m["method"]: m["seeds"] for m in found["methods"]} == {"e3va": [0, 1, 2], "full": [0, 1]}
    assert found["not_finished"] == []


def test_a_failed_run_does_not_stop_the_rest(call, trainer, tmp_path, capsys) -> None:
    trainer.ends = {("e3va", 1): 2, ("full", 0): -9}
    assert call("--seeds", "0,1") == 1
    assert len(trainer.started) == 4
    error = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in error] == [
        "e3va, seed 1: ended with exit code 2 before training finished",
        "full, seed 0: ended with exit code -9 before training finished",
    ]
    assert results(tmp_path)["not_finished"] == ["e3va, seed 1", "full, seed 0"]
    trainer.ends = {}
    assert call("--seeds", "0,1") == 0
    assert trainer.names()[4:] == [("e3va", 1), ("full", 0)]


def test_interrupted_runs_are_resumed(call, trainer, tmp_path, capsys) -> None:
    call("--seeds", "0,1", "--methods", "e3va", "--dry-run")
    words = [shlex.split(line)[4:] for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    with_checkpoint, without = tmp_path / "out/e3va/seed_0", tmp_path / "out/e3va/seed_1"
    craft(with_checkpoint, words[0], finished=False)
    without.mkdir()
    for folder in (with_checkpoint, without):
        (folder / "resources.json").write_text('{"starts": 1}')
    assert call("--seeds", "0,1", "--methods", "e3va") == 0
    assert [words.get("resume") for words in trainer.started] == [str(with_checkpoint), None]
    assert (with_checkpoint / "finished.json").is_file() and (without / "finished.json").is_file()
    assert call("--seeds", "0,1", "--methods", "e3va") == 0, "what was resumed has the same options"
    assert len(trainer.started) == 2


def test_exit_code_0_before_the_end_of_training_is_a_failure(call, trainer, tmp_path, capsys) -> None:
    trainer.ends = {("e3va", 0): "stopped"}
    assert call("--seeds", "0", "--methods", "e3va") == 1
    assert not (tmp_path / "out/e3va/seed_0/finished.json").exists()
    assert "e3va, seed 0: ended with exit code 0 before training finished" in capsys.readouterr().err


def test_ctrl_c(call, trainer, tmp_path, capsys) -> None:
    trainer.ends = {("e3va", 1): KeyboardInterrupt}
    assert call("--seeds", "0,1") == 130
    assert capsys.readouterr().err == "Interrupted; run the same command again to resume\n"
    assert trainer.names() == [("e3va", 0), ("e3va", 1)]
    assert [p.parent.name for p in (tmp_path / "out").rglob("finished.json")] == ["seed_0"]


def test_ctrl_c_ends_a_run_that_does_not_receive_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(reproduce, "GRACE", 0.1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        started = time.monotonic()
        code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        with pytest.raises(KeyboardInterrupt):
            reproduce.start([sys.executable, "-c", code])
        assert time.monotonic() - started < 20
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_exit_code_of_a_run() -> None:
    assert reproduce.start([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_runs_with_other_options_are_an_error(call, trainer, tmp_path, capsys, state) -> None:
    assert call("--seeds", "0", "--methods", "e3va", "trainer.max_epochs=2") == 0
    if state == "interrupted":
        (tmp_path / "out/e3va/seed_0/finished.json").unlink()
    capsys.readouterr()
    assert call("--seeds", "0", "--methods", "e3va", "data.batch_size=1") == 2
    error = capsys.readouterr().err
    assert "was run with trainer.max_epochs=2, not with data.batch_size=1" in error
    assert call("--seeds", "0", "--methods", "e3va") == 2
    assert "trainer.max_epochs=2, not with nothing" in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    assert call("--seeds", "0", "--methods", "e3va", "trainer.max_epochs=2", root="moved") == 0
    assert [words["dataset.root"] for words in trainer.started[1:]] == (
        [str(tmp_path / "moved")] if state == "interrupted" else []
    )


# Results


@pytest.fixture
def finish(call, tmp_path) -> Callable[..., Path]:
    """Craft a finished run with the options that the script gives it."""

    def make(
        name: str, seed: int, metrics: Any, resources: Any = None, experiment: str = "voc_retinanet_swin_l"
    ) -> Path:
        words = [f"experiment={experiment}", f"adapter={name}", f"seed={seed}", "dataset.root=any"]
        return craft(tmp_path / "out" / name / f"seed_{seed}", [*words, "backbone.pretrained=true"], metrics, resources)

    return make


def cost(params: int, peak: float | None, step: float | None) -> dict[str, Any]:
    return {"trainable_backbone_params": params, "peak_memory_allocated_mib": peak, "step_time_s": step}


def test_means_over_seeds(call, finish, tmp_path, capsys) -> None:
    box, mask = {"e3va": [0.5, 0.51, 0.53], "full": [0.52, 0.525]}, {"e3va": [0.4, 0.43, 0.41], "full": [0.45, 0.44]}
    peak, step = {"e3va": [7000.0, 7010.5, 7020.0], "full": [17000.0, 17004.0]}, {"e3va": [0.5, 0.6, 0.55]}
    step["full"] = [1.0, 1.1]
    params = {"e3va": 1_195_008, "full": 86_745_016}
    for name, scores in box.items():
        for seed in range(len(scores)):
            metrics = {"box": {"AP": scores[seed], "AP50": 0.9}, "mask": {"AP": mask[name][seed]}}
            resources = cost(params[name], peak[name][seed], step[name][seed])
            finish(name, seed, metrics, resources, experiment="coco_cascade_swin_b")
    capsys.readouterr()
    assert call("--gather-only", experiment="coco_cascade_swin_b") == 0
    for name in ("e3va", "full"):
        found = method(tmp_path, name)
        figures = {"box_AP": 100 * np.array(box[name]), "mask_AP": 100 * np.array(mask[name])}
        figures |= {"peak_memory_allocated_mib": np.array(peak[name]), "step_time_s": np.array(step[name])}
        for key, array in figures.items():
            assert found[key]["mean"] == pytest.approx(array.mean())
            assert found[key]["std"] == pytest.approx(array.std(ddof=1))
            assert list(found[key]["by_seed"].values()) == pytest.approx(array)
        assert found["trainable_backbone_params"]["mean"] == params[name]
    e3va = method(tmp_path, "e3va")
    memory, speed = (1 - np.mean(v["e3va"]) / np.mean(v["full"]) for v in (peak, step))
    assert e3va["peak_memory_allocated_mib_saved_pct"] == pytest.approx(100 * memory)
    assert e3va["step_time_s_saved_pct"] == pytest.approx(100 * speed)
    assert method(tmp_path, "full")["peak_memory_allocated_mib_saved_pct"] is None
    published = e3va["published"]
    assert (published["box_AP"], published["mask_AP"]) == (50.5, 43.8)
    assert published["trainable_backbone_params"] == 1_200_000
    assert published["peak_memory_allocated_mib_saved_pct"] == pytest.approx(100 * (1 - 7639 / 17061))
    assert results(tmp_path)["not_finished"] == ["full, seed 2"]
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert "| e3va | 0,1,2 | 51.3 ± 1.5 | 50.5 | 41.3 ± 1.5 | 43.8 |" in lines
    assert "| e3va | 1.20 | 1.20 | 7,010 ± 10 | 58.8 | 55.2 | 0.550 ± 0.050 | 47.6 |" in lines
    assert "| full | 86.75 | 86.75 | 17,002 ± 3 | - | - | 1.050 ± 0.071 | - |" in lines
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("51.3 ± 1.5", "7,010 ± 10", "0.550 ± 0.050", "86.75"))
    assert max(len(line.rstrip()) for line in shown.splitlines() if "full" in line or "e3va" in line) <= 80


def test_missing_values_are_dashes(call, finish, tmp_path) -> None:
    """One seed, no `full`, no GPU: no deviation, no saving, no memory."""
    finish("e3va", 3, {"box": {"AP50": 0.865}}, cost(1_792_512, None, 2.0))
    finish("mona", 0, {"box": {"AP50": None}}, cost(4_160_000, None, None))
    (finish("lora", 0, {}) / "metrics.json").unlink()
    assert call("--gather-only", "--methods", "e3va,lora,mona,full", "--seeds", "3") == 0
    e3va = method(tmp_path, "e3va")
    assert e3va["box_AP50"] == {"mean": 86.5, "std": None, "by_seed": {"3": 86.5}}
    assert e3va["peak_memory_allocated_mib"]["mean"] is None and e3va["step_time_s_saved_pct"] is None
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    accuracy = lines[: lines.index("|---|--:|--:|--:|--:|--:|--:|--:|")]
    assert "| e3va | 3 | 86.5 | 86.5 |" in accuracy
    assert "| mona | 0 | - | - |" in accuracy
    assert "| lora | 0 | - | 87.5 |" in accuracy
    assert "| full | - | - | 83.5 |" in accuracy
    assert rows["| e3va"] == "| e3va | 1.79 | 1.79 | - | - | 69.3 | 2.000 | - |"
    assert rows["| mona"] == "| mona | 4.16 | - | - | - | - | - | - |"
    assert rows["| full"] == "| full | - | 198.58 | - | - | - | - | - |"


def test_mean_iou_has_the_digits_of_the_paper(call, finish, tmp_path) -> None:
    for seed, value in enumerate((0.4960, 0.4972)):
        finish("e3va", seed, {"mIoU": value}, experiment="ade20k_upernet_swin_l")
    assert call("--gather-only", experiment="ade20k_upernet_swin_l") == 0
    assert "| e3va | 0,1 | 49.66 ± 0.08 | 49.64 |" in (tmp_path / "out" / "results.md").read_text()


def test_no_savings_across_devices(call, finish, tmp_path) -> None:
    finish("e3va", 0, {"box": {"AP50": 0.8}}, cost(1, 4000.0, 1.0))
    finish("full", 0, {"box": {"AP50": 0.8}}, cost(1, 8000.0, 2.0) | {"device_name": "Other GPU"})
    assert call("--gather-only") == 0
    assert results(tmp_path)["devices"] == ["1 x Other GPU", "1 x Some GPU"]
    assert method(tmp_path, "e3va")["step_time_s_saved_pct"] is None
    assert "different devices" in (tmp_path / "out" / "results.md").read_text()


def test_a_broken_file_is_named_and_excluded(call, finish, tmp_path, capsys) -> None:
    finish("e3va", 0, {"box": {"AP50": 0.8}})
    broken = ['{"box": {', "[1]", '{"box": {"AP50": NaN}}', '{"box": {"AP50": "high"}}']
    folders = [finish("e3va", seed, text) for seed, text in enumerate(broken, start=1)]
    assert call("--gather-only", "--methods", "e3va") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == len(folders) == len(results(tmp_path)["unreadable"])
    for line, folder in zip(error, folders, strict=True):
        assert line.startswith(f"reproduce.py: {folder}/metrics.json: ") and "excluded" in line
    found = method(tmp_path, "e3va")
    assert found["seeds"] == [0] and found["box_AP50"]["mean"] == 80
    assert f"- Left out: {folders[0]}/metrics.json: " in (tmp_path / "out" / "results.md").read_text()


def test_results_have_settings_and_versions(call, trainer, tmp_path) -> None:
    assert call("--seeds", "4,5", "--methods", "e3va", "trainer.max_epochs=2", "data.batch_size=4") == 0
    found = results(tmp_path)
    assert found["experiment"] == "voc_retinanet_swin_l"
    assert found["overrides"] == ["trainer.max_epochs=2", "data.batch_size=4"]
    assert found["not_the_papers"] == ["trainer.max_epochs=2"]
    assert found["devices"] == [f"1 x {GPU}"] and found["versions"] == [VERSIONS] and found["total_batch"] == [4]
    assert found["settings"]["backbone"]["name"] == "swin_l" and found["settings"]["trainer"]["max_epochs"] == 2
    assert len(found["date"]) == 10
    text = (tmp_path / "out" / "results.md").read_text()
    for line in (
        "# voc_retinanet_swin_l",
        "- Not the paper's setting: trainer.max_epochs=2",
        "- Settings: backbone swin_l, head retinanet, dataset voc, metric voc_11_point, precision 16-mixed, "
        "total batch 4 (the recipe's: 2)",
        "- Overrides: trainer.max_epochs=2 data.batch_size=4",
        f"- Device: 1 x {GPU}",
        "- Versions: python 3.12.1, torch 2.11.0",
        f"- Date: {found['date']}",
        "| e3va | 4,5 | 50.0 ± 0.0 | 86.5 |",
    ):
        assert line in text.splitlines()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["e3va", "results.json", "results.md"]


def test_the_papers_setting_has_no_note(call, tmp_path) -> None:
    assert call("--seeds", "0", "--methods", "e3va", "data.num_workers=4", "backbone.pretrained=true") == 0
    assert results(tmp_path)["not_the_papers"] == []
    assert "Not the paper's" not in (tmp_path / "out" / "results.md").read_text()


# The real command

SMALL = [
    *("backbone=swin_nano", "head.fpn_channels=32", "dataset.train_short_sides=[64]", "dataset.val_short_side=64"),
    *("dataset.max_size=96", "trainer.max_epochs=1", "data.num_workers=0", "trainer.accelerator=cpu"),
    *("trainer.tensorboard=false", "backbone.pretrained=false", "num_visualizations=0"),
]
XML = """<annotation><size><width>48</width><height>40</height></size><object><name>cat</name><bndbox>
<xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>33</ymax></bndbox></object></annotation>"""


def voc(year: Path) -> None:
    """Two images to train on, two to evaluate."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    for number, stem in enumerate("abcd"):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(year / "JPEGImages" / f"{stem}.jpg")
        (year / "Annotations" / f"{stem}.xml").write_text(XML)
    (year / "ImageSets/Main/trainval.txt").write_text("a\nb\n")
    (year / "ImageSets/Main/test.txt").write_text("c\nd\n")


@pytest.mark.slow
def test_a_real_run(tmp_path) -> None:
    voc(tmp_path / "data" / "VOC2007")
    script = Path(reproduce.__file__)
    words = ["voc_retinanet_swin_l", "--root", "data", "--methods", "e3va", "--seeds", "0", "--output", "out", *SMALL]

    def run() -> str:
        command = [sys.executable, str(script), *words]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    assert "Evaluation, in percent" in run(), "the run's own output is passed through"
    folder = tmp_path / "out" / "e3va" / "seed_0"
    metrics, resources = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "resources"))
    found = method(tmp_path, "e3va")
    assert found["box_AP50"]["mean"] == pytest.approx(100 * metrics["box"]["AP50"])
    assert found["trainable_backbone_params"]["mean"] == resources["trainable_backbone_params"]
    assert found["peak_memory_allocated_mib"]["mean"] is None, "a CPU has none"
    assert results(tmp_path)["versions"] == [resources["versions"]]
    assert results(tmp_path)["settings"]["head"] == resources["settings"]["head"]
    again = run()
    assert "Run 1 of 1: e3va, seed 0: finished" in again and "Evaluation" not in again
