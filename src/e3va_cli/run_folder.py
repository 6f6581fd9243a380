"""What a run leaves in its folder, and the words that made it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from e3va_cli.errors import UserError

CONFIG = "config.yaml"
METRICS_HISTORY = "metrics.csv"
METRICS = "metrics.json"
RESOURCES = "resources.json"
PICTURES = "predictions.png"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
BEST = "best.ckpt"


def locate(path: str, option: str) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `option=path` means: a run folder (its last one) or a file in it.

    Raises:
        UserError: neither of them, or a run that left no checkpoint.
    """
    given = Path(path)
    run = given.parent.parent if given.is_file() else given
    checkpoint = given if given.is_file() else given / CHECKPOINTS / LAST
    if not given.exists():
        raise UserError(f"{option}={path}: no such run folder or checkpoint")
    if not (run / ".hydra" / "overrides.yaml").is_file():
        raise UserError(
            f"{option}={path}: not a run of `e3va train`; give its folder, or a file under its {CHECKPOINTS}/"
        )
    if not checkpoint.is_file():
        raise UserError(f"{option}={path}: the run has no {CHECKPOINTS}/{LAST}: it stopped before its first one")
    return run, checkpoint


def overrides_of(run: Path) -> list[str]:
    """The command-line overrides that a run was started with."""
    return [str(word) for word in OmegaConf.load(run / ".hydra" / "overrides.yaml")]
