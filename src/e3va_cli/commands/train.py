"""`e3va train`."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from e3va_cli.commands.console import console
from e3va_cli.commands.data_loading import shared_memory_note
from e3va_cli.commands.error_handling import friendly_errors, training_oom_message
from e3va_cli.commands.image_grids import draw_predictions
from e3va_cli.commands.memory_check import check_memory
from e3va_cli.commands.run_summary import (
    hide_lightning_hints,
    print_next,
    print_results,
    print_start,
    print_warnings,
)
from e3va_cli.config.run_config import TrainConfig
from e3va_cli.evaluation import Results
from e3va_cli.evaluation.detection_limit import detection_limit_warning
from e3va_cli.export.adapter_checkpoint import read_checkpoint_or_adapter
from e3va_cli.export.initialization import initialize
from e3va_cli.optim.train_schedule import extended_length, is_complete
from e3va_cli.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    LAST_CHECKPOINT,
    OVERRIDES,
    PREDICTIONS_PLOT,
    find_checkpoint,
    is_rank_zero,
    write_hydra_config,
)
from e3va_cli.runs.lock import lock_folder
from e3va_cli.training.checkpoints import METADATA_KEY
from e3va_cli.training.history import histories
from e3va_cli.training.resume import read_resume_checkpoint
from e3va_cli.training.run import TrainingRun, build_run, evaluate_last_step
from e3va_cli.utils.command_line import format_command
from e3va_cli.utils.files import atomic_write, make_subfolder


def run(config: TrainConfig, *, folder: Path) -> Results | None:
    """Train, evaluate after every epoch, print the outputs, and return the last results."""
    hide_lightning_hints()
    resume = config.resume
    if config.budget is not None:
        check_memory(config, config.budget)
    if is_rank_zero():
        lock_folder(folder)
    last = None if resume is None else find_checkpoint(resume, "resume")[1]
    checkpoint = last if last is not None and last.is_file() else None  # the run may have been killed before its first
    init_from = config.init_from if checkpoint is None else None  # a resumed run has started from it already
    source = None if init_from is None else read_checkpoint_or_adapter(init_from, "init_from")
    run = build_run(config, folder)
    resumed = None if checkpoint is None else read_resume_checkpoint(checkpoint, run, config)
    initialization = None if source is None else initialize(run.model, source, run.checkpoint_contents[METADATA_KEY])
    step = 0 if resumed is None else resumed.step
    for history in histories(run.trainer):
        history.drop_from(step)
    with friendly_errors(
        folder,
        partial(training_oom_message, config, run.trainer, run.lightning_module),
        then=partial(resume_hint, folder),
    ):
        if run.trainer.is_global_zero:
            write_config(config, folder)
            print_start(config, run, folder, resumed, initialization)
            print_warnings([shared_memory_note(config)])
            prepare(folder / CHECKPOINTS, checkpoint)
        run.trainer.fit(run.lightning_module, run.data, ckpt_path=checkpoint, weights_only=True)
        finish(config, run, folder)
    return run.lightning_module.results


def finish(config: TrainConfig, run: TrainingRun, folder: Path) -> None:
    """Evaluate the last step unless it was evaluated, and print results and outputs."""
    for history in histories(run.trainer):
        history.last_step = run.trainer.global_step - 1
    # A run that max_steps ends before its first epoch's end is a trial: an evaluation would take longer than the run.
    assert run.train_schedule is not None
    is_trial = run.trainer.global_step < run.train_schedule.steps_per_epoch
    if not is_trial and run.trainer.limit_val_batches:
        evaluate_last_step(run)
    if not run.trainer.is_global_zero:
        return
    if run.lightning_module.results is None:
        reason = "the run stopped in its first epoch" if is_trial else "trainer.limit_val_batches=0"
        console.print(f"Not evaluated: {reason}.")
    else:
        print_results(run.lightning_module.results)
        print_warnings([detection_limit_warning(run.val, config.head)])
        model = run.model.to(run.trainer.strategy.root_device)  # from which Lightning has moved it
        draw_predictions(
            model,
            run.val,
            run.lightning_module.evaluator.num_images,
            config.num_visualizations,
            folder / PREDICTIONS_PLOT,
        )
    print_next(folder, config, options_to_continue(config, run))


def resume_hint(folder: Path) -> str:
    """Return how to continue once the run folder is writable again."""
    if not folder.is_dir():
        return ""
    if not (folder / OVERRIDES).is_file():
        return ", then start the run again"
    return f", then go on with: {format_command('train', {'resume': str(folder)})}"


def options_to_continue(config: TrainConfig, run: TrainingRun) -> dict[str, Any]:
    """Return the overrides with which a completed run trains longer."""
    assert run.train_schedule is not None
    stopping = run.trainer.early_stopping_callback
    early = {"trainer.early_stopping_patience": None} if stopping is not None and stopping.stopped_epoch else {}
    epochs = cast(Any, run.trainer.fit_loop.epoch_progress.current).processed
    if early and not is_complete(run.train_schedule, epochs, run.trainer.global_step, config.trainer.max_steps):
        return early
    return {**extended_length(config.schedule, run.train_schedule, config.trainer.max_steps), **early}


def prepare(folder: Path, checkpoint: Path | None) -> None:
    """Remove incomplete files from a checkpoint folder, and copy the resumed checkpoint to its `last.ckpt`."""
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink()
    if checkpoint is not None and checkpoint.resolve() != (folder / LAST_CHECKPOINT).resolve():
        make_subfolder(folder)
        with atomic_write(folder / LAST_CHECKPOINT) as temporary:
            shutil.copyfile(checkpoint, temporary)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved configuration to the run folder."""
    write_hydra_config(config, folder)
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")
