"""What commands print: the start of a run, its results, and what to do next."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from rich.markup import escape

from e3va_cli.commands.console import console, print_table
from e3va_cli.config.run_config import RunConfig
from e3va_cli.evaluation.detection_limit import detection_limit_warning
from e3va_cli.export.initialization import Initialization, part_of
from e3va_cli.models.adapters import METHODS, FrozenBackbone
from e3va_cli.models.model import parameter_counts
from e3va_cli.optim.lr_schedules import MultiStepOptions
from e3va_cli.optim.train_schedule import ScheduleOptions, TrainSchedule, extended_length, is_complete
from e3va_cli.runs.folder import (
    BEST_CHECKPOINT,
    CHECKPOINTS,
    LAST_CHECKPOINT,
    METRICS,
    METRICS_HISTORY,
    PREDICTIONS_PLOT,
    RESOURCES,
    SKIPPED_STEPS,
)
from e3va_cli.training.resume import ResumeCheckpoint
from e3va_cli.training.run import TrainingRun
from e3va_cli.utils.command_line import format_command
from e3va_cli.utils.text import pluralize, truncate_list

CLASSES_SHOWN = 20
FRESH_SHOWN = 3  # parts or layers of a model
PLACEHOLDER = "IMAGES: an image or a folder of images"
TITLES = {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}


def hide_lightning_hints() -> None:
    """Hide Lightning's hints for programmers."""
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",  # the frozen backbone is meant to be
        ".*`training_step` returned `None`.*",  # the guard says why
        ".*when logging on epoch level in distributed setting.*",  # every process logs the results of all
    ):
        warnings.filterwarnings("ignore", text)


def print_start(
    config: RunConfig,
    run: TrainingRun,
    folder: Path,
    resumed: ResumeCheckpoint | None = None,
    initialization: Initialization | None = None,
) -> None:
    """Print model, data, schedule, run folder, and the weights that the run starts from."""
    counts = parameter_counts(run.model)
    assert run.train is not None
    empty = run.train.num_filtered_images
    left_out = f" ({empty:,} without objects left out)" if empty else ""
    assert run.train_schedule is not None
    course, schedule = run.train_schedule, config.schedule
    on_head = counts["trainable_params"] - counts["trainable_backbone_params"]
    lines = {
        "Backbone": f"{config.backbone.name}, {pluralize(counts['backbone_params'], 'parameter')}, "
        f"{describe_drop_path(config)}",
        "Method": f"{config.adapter.name}, {counts['trainable_backbone_params']:,} trainable "
        f"({counts['trainable_backbone_pct']:.2f} % of the backbone)",
        "Head": f"{config.head.name}, {on_head:,} trainable",
        "Data": f"{config.dataset.name}, {pluralize(len(run.train), 'image')} to train on{left_out}, "
        f"{len(run.val):,} to evaluate",
        "Classes": describe_classes(run.val.classes),
        "Schedule": describe_schedule(course, schedule.name),
        "Memory": describe_memory(run.trainer),
        "Run folder": str(folder),
    }
    if resumed is not None:
        lines["Resumes"] = f"{resumed.path}, after {pluralize(resumed.step, 'step')}"
    if initialization is not None:
        lines["Starts from"] = f"\n{'':<12}".join(describe_initialization(initialization))
    if initialization is not None:
        lines["Starts from"] = f"\n{'':<12}".join(describe_initialization(initialization))
    for name, text in lines.items():
        console.print(f"{name:<12}{text}", markup=False)
    print_warnings(schedule_warnings(course, schedule))
    if resumed is not None:
        print_warnings(f"resumed with {change}" for change in resumed.changes)
    if resumed is not None and is_complete(course, resumed.epochs, resumed.step, config.trainer.max_steps):
        further = format_command(
            "train", {"resume": str(folder), **extended_length(schedule, course, config.trainer.max_steps)}
        )
        done = f"{pluralize(resumed.epochs, 'epoch')} and {pluralize(resumed.step, 'step')}"
        console.print(f"Training is complete after {done}; to train longer: {further}", markup=False)
    if run.model.identity.weights == "random":
        console.print(
            "[yellow]Warning: the backbone's weights are random.[/] Give backbone.pretrained=true or "
            "backbone.weights=FILE for real use; adapters trained here fit only this random backbone."
        )
    if run.train.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in run.train.dropped.items())
        console.print(f"Annotations left out of training: {reasons}")
    print_warnings([*run.train.notes, *run.val.notes, detection_limit_warning(run.val, config.head)])


def describe_initialization(initialization: Initialization) -> Iterator[str]:
    """Yield where the weights are from, how many were loaded, which classes have theirs, and what was not loaded."""
    yield f"{initialization.path}, after {pluralize(initialization.steps, 'step')}"
    counts = (f"{part} {count:,}" for part, count in initialization.loaded.items())
    yield f"tensors loaded: {', '.join(counts)}"
    classes = {"matched": initialization.matched_classes, "new": initialization.new_classes}
    listed = (f"{len(some)} {kind} ({truncate_list(some, CLASSES_SHOWN)})" for kind, some in classes.items() if some)
    yield f"classes: {', '.join(listed)}"
    by_reason: dict[str, dict[str, None]] = {}  # parts of which nothing was loaded, else layers
    for name, reason in initialization.fresh.items():
        part, layer = part_of(name), name.rpartition(".")[0]
        by_reason.setdefault(reason, {})[layer if part in initialization.loaded else part] = None
    for reason, names in by_reason.items():
        yield f"not loaded: {truncate_list(list(names), FRESH_SHOWN)} ({reason})"


def describe_memory(trainer: L.Trainer) -> str:
    """Return which memory the progress bar shows."""
    what = "of tensors on the GPU" if trainer.strategy.root_device.type == "cuda" else "of this process"
    return f"peak {what}, shown beside the progress in MiB (2^20 bytes)"


def describe_drop_path(config: RunConfig) -> str:
    """Return the drop path rate in use, as text."""
    if issubclass(METHODS[config.adapter.name], FrozenBackbone):
        return "frozen, so without drop path"
    backbone = config.backbone
    return f"drop path {backbone.model_args.get('drop_path_rate', backbone.drop_path_rate):g}"


def describe_classes(classes: list[str]) -> str:
    """Return number and names of classes, truncated."""
    return f"{len(classes)}: {truncate_list(classes, CLASSES_SHOWN)}"


def describe_schedule(course: TrainSchedule, schedule: str) -> str:
    """Return length and learning rate of a run, as text."""
    epochs = course.total_steps / course.steps_per_epoch
    adapted = f" (the recipe's is for a total batch of {course.recipe_batch})" if course.rescaled else ""
    return (
        f"{pluralize(course.total_steps, 'step')} of {pluralize(course.total_batch, 'image')}: "
        f"{pluralize(epochs, 'epoch')} of {pluralize(course.steps_per_epoch, 'step')}; {schedule} from "
        f"{course.lr:.3g}{adapted} after {pluralize(course.warmup_steps, 'step')} of warm-up"
    )


def schedule_warnings(course: TrainSchedule, schedule: ScheduleOptions) -> Iterator[str]:
    """Yield a warning for each part of a schedule that does not fit the run's length."""
    if course.warmup_steps < course.recipe_warmup:
        yield (
            f"the warm-up is shortened from {course.recipe_warmup:,} to {course.warmup_steps:,} of the run's "
            f"{pluralize(course.total_steps, 'step')} (schedule.warmup_max_fraction={schedule.warmup_max_fraction:g})"
        )
    milestones = schedule.milestones if isinstance(schedule, MultiStepOptions) else []
    late = [epoch for epoch in milestones if round(epoch * course.stretch) >= course.epochs]
    if late:
        yield (
            f"the run ends after {pluralize(course.epochs, 'epoch')}, before the learning rate falls at "
            f"{' and '.join(map(str, late))}; give schedule.milestones=[...] for its length"
        )


def print_results(results: dict[str, Any]) -> None:
    """Print a table of results over all classes, and one of each class."""
    kinds = results if "per_class" not in results else {"all pixels": results}
    names = [name for name in next(iter(kinds.values())) if name != "per_class"]
    rows = [[escape(kind), *(_percent(values[name]) for name in names)] for kind, values in kinds.items()]
    print_table("Evaluation, in percent", ["", *(TITLES.get(name, name) for name in names)], rows)
    title = "IoU" if "mIoU" in names else names[0]
    classes = next(iter(kinds.values()))["per_class"]
    rows = [[escape(name), *(_percent(values["per_class"][name]) for values in kinds.values())] for name in classes]
    print_table(f"{title} of each class, in percent", ["class", *map(escape, kinds)], rows)


def print_warnings(notes: Iterable[str | None]) -> None:
    """Print each warning once."""
    for note in dict.fromkeys(filter(None, notes)):
        console.print(f"[yellow]Warning:[/] {escape(note)}")


FILES = {
    METRICS: "results of the last evaluation",
    METRICS_HISTORY: "history of losses and results",
    RESOURCES: "memory, step time, parameters",
    PREDICTIONS_PLOT: "validation images with predictions",
    SKIPPED_STEPS: "batches that changed no weight: NaN or infinite losses, or out-of-memory errors",
    f"{CHECKPOINTS}/{LAST_CHECKPOINT}": "the last checkpoint",
    f"{CHECKPOINTS}/{BEST_CHECKPOINT}": "the checkpoint with the best evaluation",
}


def print_next(folder: Path, config: RunConfig, further: dict[str, Any]) -> None:
    """Print the outputs of a run, and the next commands.

    Args:
        folder: of the run.
        config: its configuration.
        further: overrides with which it trains longer.
    """
    console.print(f"\nRun folder: {folder}", markup=False)
    for name, what in FILES.items():
        if (folder / name).exists():
            console.print(f"  {name:<22} {what}")
    checkpoint = {"checkpoint": str(folder)}
    console.print(f"\nNext ({PLACEHOLDER}, ADAPTER for a new folder):")
    print_command("evaluate", {**checkpoint, **needed_to_evaluate(config)})
    print_command("predict", {**checkpoint, "input": "IMAGES"})
    print_command("export-adapter", {**checkpoint, "output": "ADAPTER"})
    print_command("train", {"resume": str(folder), **further})


def needed_to_evaluate(config: RunConfig) -> dict[str, Any]:
    """Return the overrides that an evaluation of a run needs."""
    return {"trainer.limit_val_batches": None} if config.trainer.limit_val_batches == 0 else {}


def print_command(command: str, options: dict[str, Any]) -> None:
    """Print a command."""
    console.print(f"  {format_command(command, options)}", markup=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
