"""The files of a run folder, and how runs, checkpoints and adapters are found."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.command_line import format_command
from e3va_cli.utils.files import atomic_write, make_subfolder
from e3va_cli.utils.text import is_printable_name, shorten

CONFIG = "config.yaml"
METRICS_HISTORY = "metrics.csv"
METRICS = "metrics.json"
RESOURCES = "resources.json"
SKIPPED_STEPS = "skipped_steps.json"
PREDICTIONS_PLOT = "predictions.png"
DETECTIONS = "detections.json"
PRECISION_RECALL_PLOT = "precision_recall.png"
CONFUSION_MATRIX_PLOT = "confusion.png"
LOCK = ".lock"
HYDRA_FOLDER = ".hydra"  # as Hydra names it
OVERRIDES = f"{HYDRA_FOLDER}/overrides.yaml"
CHECKPOINTS = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
ADAPTER_CONFIG = "adapter_config.json"  # of an exported adapter, as the next two
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CARD = "README.md"


def make_unique_folder(path: Path) -> Path:
    """Create a new folder and return it: `path`, or if it exists, `path` with the suffix -2, -3, ...

    Raises:
        UserError: it cannot be created.
    """
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not os.path.lexists(folder):
                raise UserError(f"{folder}: cannot be created ({error.filename}: {error.strerror})") from None
    raise AssertionError("unreachable")


@cache
def make_run_folder(path: str) -> str:
    """Return the run folder of this process, which rank 0 creates. Cached, as Hydra resolves it more than once."""
    return str(make_unique_folder(Path(path))) if is_rank_zero() else path


def is_rank_zero() -> bool:
    """Return whether this process is rank 0 of a run, or the only one, by its environment variables."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def check_unused(folder: Path, resumed: Path | None) -> None:
    """Check that a run folder has no checkpoints, except those of the run that is resumed.

    Raises:
        UserError: it has.
    """
    if any((folder / CHECKPOINTS).glob("*.ckpt")) and not (resumed and folder.samefile(resumed)):
        raise UserError(
            f"hydra.run.dir={folder}: already has a run; resume it with "
            f"{format_command('train', {'resume': str(folder)})}, or use another folder"
        )


def remove_empty_run(folder: Path) -> None:
    """Remove a run folder if it has nothing but Hydra's files and the lock."""
    if {path.name for path in folder.iterdir()} <= {HYDRA_FOLDER, LOCK}:
        shutil.rmtree(folder)


def write_hydra_config(config: Any, folder: Path) -> None:
    """Write the files that Hydra writes to `.hydra`; without Hydra, the configuration alone.

    Hydra itself would overwrite the files of a resumed run before the checkpoint is checked, and leave empty files on a
    full disk.

    Args:
        config: a dataclass.
        folder: of the run.

    Raises:
        UnwritableError: they cannot be written; the previous files are unchanged.
    """
    files: dict[str, Any] = {"config": asdict(config)}
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        files |= {"hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
    make_subfolder(folder / HYDRA_FOLDER)
    for name, content in files.items():
        with atomic_write(folder / HYDRA_FOLDER / f"{name}.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")


def find_adapter_folder(path: str) -> Path | None:
    """Return the folder of an exported adapter from its path or that of a file in it; None if it is no adapter."""
    given = Path(path)
    if given.is_file():
        return given.parent if given.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) else None
    return given if any((given / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)) else None


def find_checkpoint(path: str, option: str) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint of `option=path`, the path of a run (its last checkpoint) or checkpoint.

    With `resume=`, the checkpoint may be missing: a run killed before its first one starts from the beginning.

    Raises:
        UserError: there is no run or checkpoint.
    """
    given = Path(path)
    absolute = Path(os.path.abspath(given))  # noqa: PTH100 (resolve() would follow a link out of the run)
    run = absolute.parent.parent if given.is_file() else given
    checkpoint = given if given.is_file() else given / CHECKPOINTS / LAST_CHECKPOINT
    if not given.exists():
        raise UserError(f"{option}={path}: no such run folder or checkpoint")
    if find_adapter_folder(path):
        raise UserError(f"{option}={path}: an exported adapter; use the run that it was exported from")
    if not (run / OVERRIDES).is_file():
        empty = "an empty folder, " if run.is_dir() and not any(run.iterdir()) else ""
        raise UserError(
            f"{option}={path}: {empty}not a run of `e3va train`; use the run folder, or a file in its {CHECKPOINTS}/"
        )
    if not checkpoint.is_file() and option != "resume":
        raise UserError(
            f"{option}={path}: no {CHECKPOINTS}/{LAST_CHECKPOINT}: the run stopped before its first checkpoint"
        )
    return run, checkpoint


def read_run_config(run: Path) -> dict[str, Any] | None:
    """Return the configuration of a run as plain values; None if the run was killed before it was written."""
    path = run / CONFIG
    return cast("dict[str, Any]", _read_yaml(path, dict)) if path.is_file() else None


def write_overrides(run: Path, overrides: list[str]) -> None:
    """Write the overrides that a run is started with, as Hydra does."""
    make_subfolder(run / HYDRA_FOLDER)
    with atomic_write(run / OVERRIDES) as temporary:
        temporary.write_text(yaml.safe_dump(overrides, allow_unicode=True), encoding="utf-8")


def read_overrides(run: Path) -> list[str]:
    """Return the overrides that a run was started with, interpolations not resolved."""
    path = run / OVERRIDES
    overrides = _read_yaml(path, list)
    if wrong := [override for override in overrides if not is_printable_name(override)]:
        raise UserError(f"{path}: {shorten(wrong[0])} is not an override")
    return cast("list[str]", overrides)


def _read_yaml(path: Path, expected: type) -> Any:
    """Return the plain content of an untrusted YAML file, interpolations not resolved.

    Raises:
        UserError: it cannot be read, is not of the `expected` type, or has aliases, by which a kilobyte can become
            gigabytes.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("aliases are not allowed")
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML ({first_line(error)})") from None
    if not isinstance(content, expected):
        raise UserError(f"{path}: not a {expected.__name__}; the file was changed after `e3va train` wrote it")
    return content
