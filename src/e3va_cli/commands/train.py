"""`e3va train`."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from e3va_cli.commands.budget_gate import require_fit
from e3va_cli.commands.console import console
from e3va_cli.commands.failures import in_one_line, of_training
from e3va_cli.commands.loading import shared_memory_note
from e3va_cli.commands.pictures import draw_predictions
from e3va_cli.commands.report import (
    hide_lightning_hints,
    print_next,
    print_results,
    print_start,
    print_warnings,
)
from e3va_cli.composition import plain
from e3va_cli.files import replacing
from e3va_cli.metrics.limits import limit_note
from e3va_cli.run_folder import CHECKPOINTS, CONFIG, LAST, PICTURES, is_first_process, locate
from e3va_cli.run_lock import hold
from e3va_cli.training.checkpoints import (
    OF_TASK,
    read_checkpoint,
    require_fitting_optimizer,
    require_same_weights,
    verify,
)
from e3va_cli.training.history import histories
from e3va_cli.training.run import Run, build_run


def run(cfg: DictConfig) -> None:
    """Train, evaluate after every epoch, and say where the results lie."""
    hide_lightning_hints()
    config = plain(cfg)
    resume, budget = config.pop("resume"), config.pop("budget")
    if budget is not None:
        require_fit(config, budget)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if is_first_process():
        hold(folder)
    run = build_run(config, folder)
    last = None if resume is None else locate(resume, "resume")[1]
    checkpoint = last if last is not None and last.is_file() else None  # the run may have been killed before its first
    step = 0
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        verify(content, checkpoint, run.task.about)
        state = {name.removeprefix(OF_TASK): value for name, value in content["state_dict"].items()}
        require_same_weights(state, run.model, checkpoint)
        require_fitting_optimizer(content, run.task.build_optimizer(run.model), checkpoint)
        step = content["global_step"]
    for history in histories(run.trainer):
        history.drop_from(step)
    with in_one_line(folder, partial(of_training, config, run.trainer, run.task)):
        if run.trainer.is_global_zero:
            write_config(cfg, folder)
            print_start(config, run, folder, checkpoint, step)
            print_warnings([shared_memory_note(config)])
            prepare(folder / CHECKPOINTS, checkpoint)
        run.trainer.fit(run.task, run.data, ckpt_path=checkpoint, weights_only=True)
        finish(config, run, folder)


def finish(config: dict[str, Any], run: Run, folder: Path) -> None:
    """Evaluate what has not been evaluated, and say where the results lie."""
    for history in histories(run.trainer):
        history.last_step = run.trainer.global_step - 1
    # A run that max_steps ends before its first epoch's end is a trial: an evaluation would take longer than the run.
    assert run.course is not None
    is_trial = run.trainer.global_step < run.course.steps_per_epoch
    if run.task.evaluated_step != run.trainer.global_step and not is_trial and run.trainer.limit_val_batches:
        run.trainer.validate(run.task, run.data, verbose=False)
    if not run.trainer.is_global_zero:
        return
    if run.task.results is None:
        reason = "the run stopped in its first epoch" if is_trial else "trainer.limit_val_batches=0"
        console.print(f"Not evaluated: {reason}.")
    else:
        print_results(run.task.results)
        print_warnings([limit_note(run.val, config["head"])])
        model = run.model.to(run.trainer.strategy.root_device)  # from which Lightning has moved it
        draw_predictions(model, run.val, run.task.evaluator.images, config["pictures"], folder / PICTURES)
    print_next(folder)


def prepare(folder: Path, checkpoint: Path | None) -> None:
    """Clear a folder of checkpoints of what was half written; the checkpoint that is resumed becomes its last one."""
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink()
    if checkpoint is not None and checkpoint.resolve() != (folder / LAST).resolve():
        with replacing(folder / LAST) as temporary:
            shutil.copyfile(checkpoint, temporary)


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Keep the resolved configuration in the run folder."""
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
