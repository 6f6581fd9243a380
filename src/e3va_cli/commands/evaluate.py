"""`e3va evaluate`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from e3va_cli.commands.console import console
from e3va_cli.commands.pictures import draw_predictions
from e3va_cli.commands.report import hide_lightning_hints, print_results
from e3va_cli.composition import plain
from e3va_cli.export.trained import load_trained, read_trained
from e3va_cli.run_folder import METRICS, PICTURES
from e3va_cli.training.checkpoints import ABOUT, verify
from e3va_cli.training.run import build_run


def run(cfg: DictConfig) -> None:
    """Measure what was trained on the validation images."""
    hide_lightning_hints()
    config = plain(cfg)
    trained = read_trained(config.pop("checkpoint"), "checkpoint")
    folder = Path(HydraConfig.get().runtime.output_dir)
    run = build_run(config, folder, evaluate_only=True)
    verify({ABOUT: trained.about}, trained.path, run.task.about)
    load_trained(run.model, trained)
    run.trainer.validate(run.task, run.data, verbose=False)
    if run.trainer.is_global_zero and run.task.results is not None:
        print_results(run.task.results)
        files = {METRICS: "all of these results", **run.task.evaluator.leave(folder)}
        if draw_predictions(run.model, run.val, run.task.evaluator.images, config["pictures"], folder / PICTURES):
            files[PICTURES] = "validation images with what was found"
        console.print(f"\nEvaluation: {folder}")
        for name, what in files.items():
            console.print(f"  {name:<22} {what}")
