"""What `e3va train` does before it trains; whole runs are in tests/training."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from e3va_cli.commands import evaluate, train
from e3va_cli.commands import run_summary as report
from e3va_cli.commands.app import check_run_dir
from e3va_cli.commands.saved_config import with_saved_config
from e3va_cli.commands.train import prepare
from e3va_cli.config.composition import parse
from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError
from e3va_cli.runs.folder import find_checkpoint, make_run_folder, make_unique_folder, remove_empty_run
from e3va_cli.training.run import build_run
from tests.training.small import SMALL


def test_what_a_killed_run_half_wrote_is_cleared(tmp_path):
    (tmp_path / ".last.ckpt.12.tmp").write_text("half")
    (tmp_path / "last.ckpt").write_text("last")
    prepare(tmp_path, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "last"


def test_the_checkpoint_that_is_resumed_becomes_the_last_one(tmp_path):
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).write_text(name)
    prepare(tmp_path, tmp_path / "best.ckpt")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"best.ckpt"}


def test_a_run_killed_before_its_first_checkpoint_may_be_resumed(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[]")
    _, checkpoint = find_checkpoint(str(tmp_path), "resume")
    assert not checkpoint.exists()


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = tmp_path / "runs" / "2026-11-21_12-00-00_train"
    assert [make_unique_folder(name).name[len(name.name) :] for _ in range(3)] == ["", "-2", "-3"]
    assert make_run_folder(str(name)) == make_run_folder(str(name)) == f"{name}-4", (
        "Hydra asks again, and means the same"
    )
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert make_run_folder(f"{name}x") == f"{name}x" and not (tmp_path / "runs" / f"{name.name}x").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "runs").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"a: cannot be created \(.*runs: File exists\)"):
        make_unique_folder(tmp_path / "runs" / "a")


@pytest.fixture
def run_of(tmp_path):
    """A run started with these words, which has a checkpoint."""

    def make(name, *words):
        run = tmp_path / name
        for folder in (".hydra", "checkpoints"):
            (run / folder).mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text("\n".join(f"- {word}" for word in words) or "[]")
        (run / "checkpoints" / "last.ckpt").touch()
        return run

    return make


def test_a_run_is_not_put_over_another(run_of, tmp_path, monkeypatch):
    one, other = run_of("one"), run_of("other")
    for words in ([], [f"resume={other}"]):
        with pytest.raises(UserError, match=f"one: already has a run; resume it with e3va train resume={one}"):
            check_run_dir([f"hydra.run.dir={one}", *words], writes=False)
    check_run_dir([f"hydra.run.dir={one}", f"resume={one}/checkpoints/last.ckpt"], writes=False)
    check_run_dir([f"hydra.run.dir={tmp_path}/new"], writes=False)
    check_run_dir([], writes=False)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process may have put its checkpoint there already
    check_run_dir([f"hydra.run.dir={one}", f"resume={other}"], writes=False)


def test_a_refused_run_leaves_no_folder(run_of, tmp_path):
    (tmp_path / "refused" / ".hydra").mkdir(parents=True)
    run = run_of("run")
    for folder in (run, tmp_path / "refused"):
        remove_empty_run(folder)
    assert run.is_dir() and not (tmp_path / "refused").exists()


def test_what_a_run_was_started_with(run_of):
    run = run_of("it's [one]", "budget=11GiB", "init_from=runs/7", "seed=3")
    words = with_saved_config("train", ["trainer.max_epochs=5"], str(run))
    assert {o.key_or_group: o.value() for o in parse(words)}["hydra.run.dir"] == str(run)
    assert {"budget=11GiB", "init_from=runs/7"} < set(words)
    assert with_saved_config("evaluate", [], str(run)) == ["seed=3"], "an evaluation has neither"


def test_images_are_drawn_on_the_device_of_training(config, tmp_path, monkeypatch):
    """Lightning leaves the model on the CPU."""
    drawn, device = [], torch.device("meta")

    def draw(model, *_):
        drawn.append(next(model.parameters()).device)

    monkeypatch.setattr(train, "draw_predictions", draw)
    monkeypatch.setattr(train, "print_results", lambda _: None)
    run = build_run(config(*SMALL), tmp_path)
    run.lightning_module.results, run.lightning_module.evaluated_step = {}, 0
    monkeypatch.setattr(type(run.trainer.strategy), "root_device", device)
    train.finish(config(*SMALL), run, tmp_path)
    monkeypatch.setattr(evaluate, "draw_predictions", draw)
    evaluator = SimpleNamespace(num_images=1, save=lambda _: {})
    evaluation = SimpleNamespace(run=run, evaluators={"a": evaluator}, results={"a": {}})
    adapter = SimpleNamespace(name="a", model=nn.Linear(1, 1), config=SimpleNamespace(num_visualizations=1))
    evaluate.save(evaluation, adapter, tmp_path)
    assert drawn == [device, device]


def test_names_in_brackets_are_printed_as_they_are(config, tmp_path, capsys):
    folder = tmp_path / "[red]a" / "[" / "b]"
    report.print_next(folder, config(), {"trainer.max_epochs": 4})
    report.print_results({"[/bold]": {"AP": 0.5, "per_class": {"[x]": 0.5}}})
    out = capsys.readouterr().out
    assert f"\"resume='{folder}'\" trainer.max_epochs=4" in out and "[/bold]" in out and "[x]" in out


def warned(config, tmp_path, capsys, *words):
    """The start of a run, in one line, as a terminal of any width may break it."""
    options = config(*SMALL, *words)
    report.print_start(options, build_run(options, tmp_path), tmp_path)
    return " ".join(capsys.readouterr().out.split())


def test_a_warm_up_that_is_shortened_is_said(config, tmp_path, capsys):
    out = warned(config, tmp_path, capsys, "schedule.warmup_steps=50", "schedule.epochs=5")
    line = "Warning: the warm-up is shortened from 50 to 1 of the run's 4 steps (schedule.warmup_max_fraction=0.1)"
    assert line in out, "trainer.max_epochs=1 of four steps"
    out = warned(config, tmp_path, capsys, "schedule.warmup_steps=0")
    assert "shortened" not in out


def test_a_run_that_ends_before_its_milestones_is_said(config, tmp_path, capsys):
    words = ["schedule=multistep", "schedule.milestones=[1,3]"]
    out = warned(config, tmp_path, capsys, *words, "trainer.max_epochs=3")
    assert "Warning: the run ends after 3 epochs, before the learning rate falls at 3; give schedule.milestones" in out
    assert "Warning: the run ends" not in warned(config, tmp_path, capsys, *words, "trainer.max_epochs=4")


@pytest.mark.parametrize(("method", "says"), [("e3va", "frozen, so without drop path"), ("lora", "drop path 0.4")])
def test_what_drop_path_comes_to_is_said(config, tmp_path, capsys, method, says):
    assert says in warned(config, tmp_path, capsys, f"adapter={method}", "backbone.drop_path_rate=0.4")


def test_a_run_goes_on_with_its_own_recipe_where_defaults_have_changed(config, run_of):
    """A run from before the learning rate went with the square root of the batch, and more."""
    words = ["dataset=coco", "dataset.root=x", "optimizer.lr=2e-4"]
    run, was = run_of("run", *words), to_dict(config(*words))
    was["schedule"]["lr_scaling"], was["trainer"]["max_epochs"] = "linear", 36
    for group, option in (("optimizer", "decay_biases"), ("schedule", "warmup_max_fraction")):
        del was[group][option]
    (run / "config.yaml").write_text(OmegaConf.to_yaml(was))
    found = {o.key_or_group: o.value() for o in parse(with_saved_config("train", ["trainer.devices=2"], str(run)))}
    expected = {
        **{"dataset": "coco", "dataset.root": "x", "optimizer.lr": 2e-4},  # as it was started
        **{"schedule.lr_scaling": "linear", "trainer.max_epochs": 36},
        **{"optimizer.decay_biases": False, "schedule.warmup_max_fraction": 1.0},
        **{"hydra.run.dir": str(run), "trainer.devices": 2},
    }
    assert {key: found[key] for key in expected} == expected
    given = with_saved_config("train", ["schedule.lr_scaling=none"], str(run))
    assert [word for word in given if "lr_scaling" in word] == ["schedule.lr_scaling=none"]
