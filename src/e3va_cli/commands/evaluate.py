"""`e3va evaluate`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from e3va_cli.commands.console import console
from e3va_cli.commands.pictures import draw_predictions
from e3va_cli.commands.report import hide_lightning_hints, print_results
from e3va_cli.composition import plain
from e3va_cli.run_folder import METRICS, PICTURES, locate
from e3va_cli.training.checkpoints import read_checkpoint, verify
from e3va_cli.training.run import build_run


def run(cfg: DictConfig) -> None:
    """Measure a checkpoint on the validation images."""
    hide_lightning_hints()
    config = plain(cfg)
    _, checkpoint = locate(config.pop("checkpoint"), "checkpoint")
    folder = Path(HydraConfig.get().runtime.output_dir)
    content = read_checkpoint(checkpoint)
    run = build_run(config, folder, evaluate_only=True)
    verify(content, checkpoint, run.task.about)
    run.task.load_state_dict(content["state_dict"], strict=False)
    run.trainer.validate(run.task, run.data, verbose=False)
    if run.trainer.is_global_zero and run.task.results is not None:
        print_results(run.task.results)
        draw_predictions(run.model, run.val, run.task.evaluator.images, config["pictures"], folder / PICTURES)
        console.print(f"Results and drawn predictions: {folder / METRICS}, {PICTURES}")
