"""Whole runs: the files they leave, going on after a stop, several processes, and evaluation of what was trained."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from e3va_cli.training.checkpoint_callback import CheckpointCallback
from e3va_cli.training.run import build_run
from tests.conftest import QUICK
from tests.training.small import SMALL


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_files_of_a_run(short_run):
    found = {str(p.relative_to(short_run)) for p in short_run.rglob("*") if p.is_file()}
    assert found == {
        ".lock",
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        "config.yaml",
        "metrics.csv",
        "metrics.json",
        "predictions.png",
        "resources.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    }


def test_metrics_and_resources(short_run):
    metrics = json.loads((short_run / "metrics.json").read_text())
    assert set(metrics) == {"box", "mask"} and 0 <= metrics["box"]["AP50"] <= 1
    assert set(metrics["box"]["per_class"]) == {"circle", "square", "triangle", "star", "ring"}
    resources = json.loads((short_run / "resources.json").read_text())
    assert resources["device"] == "cpu"
    assert resources["peak_memory_allocated_mib"] is None, "a CPU has no CUDA memory, not zero of it"
    assert resources["process_peak_rss_mib"] > 100
    assert resources["trainable_backbone_params"] == 96_000
    assert resources["trainable_params"] < resources["total_params"]
    assert set(resources["versions"]) >= {"python", "torch", "torchvision", "timm", "lightning"}
    history = rows(short_run)
    assert [int(r["step"]) for r in history if r["train/loss"]] == [0, 1, 2, 3]
    assert history[-1]["val/box_AP"] == str(metrics["box"]["AP"]) or any(r["val/box_AP"] for r in history)


def test_a_checkpoint_holds_what_was_trained_and_never_the_backbone(short_run, config):
    checkpoint = torch.load(short_run / "checkpoints" / "last.ckpt", weights_only=True)
    run = build_run(config(*QUICK), short_run / "unused")
    trainable = {f"model.{n}" for n, p in run.model.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == trainable
    assert not any(".backbone." in name for name in checkpoint["state_dict"])
    assert checkpoint["e3va"]["backbone"]["fingerprint"] == run.model.identity.fingerprint
    assert checkpoint["e3va"]["classes"] == ["circle", "square", "triangle", "star", "ring"]
    assert checkpoint["optimizer_states"] and checkpoint["lr_schedulers"] and checkpoint["global_step"] == 4


def test_evaluate_gives_the_numbers_of_training(short_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/none")  # nor does it need a place there for caches
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "e3va_cli", "evaluate", f"checkpoint={short_run}", "hydra.run.dir=eval"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    ours = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert ours == json.loads((short_run / "metrics.json").read_text())
    assert "AP of each class" in out
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == [
        ".hydra",
        "detections.json",
        "metrics.json",
        "precision_recall.png",
        "predictions.png",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backbone=swin_t"], "trained on the backbone swin_nano, not on swin_t"),
        (["backbone.seed=1"], "trained on other weights of swin_nano"),
        (["adapter.rank=8"], "another adapter; different options: rank"),
        (["head=mask_rcnn"], "another head"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(short_run, e3va, words, says):
    done = e3va("evaluate", f"checkpoint={short_run}", *words, expect=2)
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_checkpoint_is_refused(short_run, e3va, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(short_run, damaged)
    path = damaged / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    for words in (["evaluate", f"checkpoint={damaged}"], ["train", f"resume={damaged}"]):
        done = e3va(*words, expect=2)
        assert "not a readable checkpoint" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_same_seed_gives_the_same_bits_in_another_process(short_run, config, tmp_path):
    run = build_run(config(*QUICK, "data.num_workers=1"), tmp_path)
    run.trainer.fit(run.lightning_module, run.data)
    ours, theirs = trained(tmp_path), trained(short_run)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((short_run / "metrics.json").read_text())


def test_the_same_seed_gives_the_same_bits_with_any_number_of_loader_processes(config, tmp_path):
    """Flips, jittered sizes and sampled proposals are drawn, and all of them from the seed."""
    words = [*SMALL, "head=mask_rcnn_nano", "dataset.train_short_sides=[64,96]", "dataset.max_size=96"]
    found = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        run = build_run(config(*words, "trainer.limit_val_batches=0", f"data.num_workers={workers}"), folder)
        run.trainer.fit(run.lightning_module, run.data)
        found.append(trained(folder))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_nothing_is_written_to_the_data(config, write_coco, annotate, tmp_path):
    folder, annotations = write_coco([annotate(1, [2, 2, 20, 20]), annotate(2, [4, 4, 10, 10], image_id=5)])

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (annotations, *folder.rglob("*"))}

    before = state()
    words = [
        f"dataset.{split}_{what}={path}"
        for split in ("train", "val")
        for what, path in (("annotations", annotations), ("images", folder))
    ]
    small = [
        word
        for word in SMALL
        if word.split("=")[0] not in ("dataset.train_images", "dataset.val_images", "dataset.image_size")
    ]
    run = build_run(
        config("dataset=coco", f"dataset.root={tmp_path}", *small, *words, "trainer.max_epochs=1"), tmp_path / "run"
    )
    run.trainer.fit(run.lightning_module, run.data)
    assert state() == before


FOUR = ["trainer.max_epochs=4", "trainer.limit_val_batches=1"]


class KilledError(Exception):
    """Stands for a run that is killed."""


@pytest.mark.parametrize("schedule", ["multistep", pytest.param("cosine", marks=pytest.mark.slow)])
def test_two_and_two_epochs_equal_four(config, tmp_path, schedule):
    options = [*QUICK, *FOUR, f"schedule={schedule}", "schedule.warmup_steps=3"]

    class Killer(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KilledError

    def start(name, *callbacks, resume=None):
        run = build_run(config(*options), tmp_path / name)
        run.trainer.callbacks += callbacks
        run.trainer.fit(run.lightning_module, run.data, ckpt_path=resume, weights_only=True)

    start("straight")
    with pytest.raises(KilledError):
        start("killed", Killer())
    start("killed", resume=tmp_path / "killed" / "checkpoints" / "last.ckpt")
    straight, resumed = trained(tmp_path / "straight"), trained(tmp_path / "killed")
    assert set(straight) == set(resumed)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_resume_by_the_command_goes_on_in_the_same_folder(short_run, e3va, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(short_run, folder)
    before = rows(folder)
    e3va("train", f"resume={folder}", "trainer.max_epochs=2")
    after = rows(folder)
    assert [r for r in after if int(r["step"]) < 4] == [
        {**dict.fromkeys(after[0], ""), **r} for r in before if int(r["step"]) < 4
    ], "the history is kept"
    assert [int(r["step"]) for r in after if r["train/loss"]] == list(range(8))
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    assert not (tmp_path / "runs").exists()
    # A second resume still knows what the first run was started with.
    e3va("train", f"resume={folder}", "trainer.max_epochs=3")
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12


# Every anchor and every proposal is used, so that nothing is drawn at random.
ALL = ["head.rpn.batch_size_per_image=100000", "head.box.batch_size_per_image=100000", "dataset.flip=0"]


def test_two_processes_give_the_loss_of_one(e3va, config, tmp_path):
    """The mean over two ranks with one image each is what one process accumulates over two steps of one image."""
    common = [*QUICK, *ALL, "trainer.limit_val_batches=2", "dataset.val_images=5", "data.batch_size=1"]
    e3va("train", *common, "trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path}/two")
    e3va("train", *common, "trainer.accumulate_grad_batches=2", f"hydra.run.dir={tmp_path}/one")
    two, one = trained(tmp_path / "two"), trained(tmp_path / "one")
    start = build_run(config(*common), tmp_path / "unused").lightning_module.state_dict()
    moved = sum((one[name] - start[name]).abs().sum() for name in one)
    apart = sum((one[name] - two[name]).abs().sum() for name in one)
    assert moved > 1 and apart < 1e-3 * moved
    losses = [float(r["train/loss"]) for r in rows(tmp_path / "two") if r["train/loss"]]
    single = [float(r["train/loss"]) for r in rows(tmp_path / "one") if r["train/loss"]]
    assert len(losses) == 4 and len(single) >= 4
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert metrics[1]["box"].keys() == metrics[0]["box"].keys()


def test_early_stopping(config, tmp_path):
    run = build_run(
        config(
            *QUICK,
            "trainer.max_epochs=6",
            "trainer.early_stopping_patience=1",
            "trainer.limit_val_batches=1",
            "optimizer.lr=1e-12",
        ),
        tmp_path,
    )
    run.trainer.fit(run.lightning_module, run.data)
    assert run.trainer.current_epoch == 2


def test_mixed_precision(config, tmp_path):
    run = build_run(config(*QUICK, "trainer.precision=bf16-mixed", "trainer.max_steps=2"), tmp_path)
    run.trainer.fit(run.lightning_module, run.data)
    assert all(torch.isfinite(v).all() for v in trained(tmp_path).values())
    assert all(v.dtype == torch.float32 for v in trained(tmp_path).values())


def test_a_run_of_many_short_epochs_evaluates_and_keeps_its_state_as_its_recipe_does(config, tmp_path, monkeypatch):
    """Two epochs of the recipe on a data set of 4 steps, with at least 24: 6 epochs, an evaluation after every 3rd."""
    kept: list[int] = []
    monkeypatch.setattr(CheckpointCallback, "save", lambda _, trainer: kept.append(trainer.global_step))
    words = ["trainer.max_epochs=null", "schedule.epochs=2", "schedule.min_steps=24"]
    run = build_run(config(*SMALL, *words), tmp_path)
    assert run.train_schedule is not None and (run.train_schedule.epochs, run.train_schedule.stretch) == (6, 3.0)
    run.trainer.fit(run.lightning_module, run.data)
    evaluated = [int(row["step"]) + 1 for row in rows(tmp_path) if row["val/box_AP"]]
    assert run.trainer.global_step == 24 and evaluated == [12, 24]
    assert sorted(set(kept)) == [0, 12, 24]
