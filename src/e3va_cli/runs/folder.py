"""What a run leaves in its folder, and the words that made it."""

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

from e3va_cli.utils.command_line import command_line
from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.files import make_subfolder, atomic_write
from e3va_cli.utils.text import shorten, is_name

CONFIG = "config.yaml"
METRICS_HISTORY = "metrics.csv"
METRICS = "metrics.json"
RESOURCES = "resources.json"
SKIPPED_STEPS = "skipped_steps.json"
PICTURES = "predictions.png"
DETECTIONS = "detections.json"
CURVES = "precision_recall.png"
CONFUSION = "confusion.png"
LOCK = ".lock"
NOTES = ".hydra"  # Hydra's name for it
OVERRIDES = f"{NOTES}/overrides.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
BEST = "best.ckpt"
ADAPTER_CONFIG = "adapter_config.json"  # these three make an exported adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CARD = "README.md"


def claim_folder(path: Path) -> Path:
    """Make a folder that was not there before: `path`, or that with -2, -3, ... at its end; two runs never share one.

    Raises:
        UserError: it cannot be made.
    """
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not os.path.lexists(folder):
                raise UserError(f"{folder}: the folder cannot be made ({error.filename}: {error.strerror})") from None
    raise AssertionError("unreachable")


@cache
def new_folder(path: str) -> str:
    """The folder of this process's run: Hydra asks for it more than once.

    Of the processes that a cluster starts for one run, the first claims it.
    """
    return str(claim_folder(Path(path))) if is_rank_zero() else path


def is_rank_zero() -> bool:
    """Whether this is not one of the further processes of a run, whoever started them."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def require_unused(folder: Path, resumed: Path | None) -> None:
    """Raises UserError if a run is to lie in a folder that holds another one than the one that it goes on with."""
    if any((folder / CHECKPOINTS).glob("*.ckpt")) and not (resumed and folder.samefile(resumed)):
        raise UserError(
            f"hydra.run.dir={folder}: holds a run already; go on with it by "
            f"{command_line('train', {'resume': str(folder)})}, or give another folder"
        )


def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that was refused before it left anything but Hydra's notes and its lock."""
    if {path.name for path in folder.iterdir()} <= {NOTES, LOCK}:
        shutil.rmtree(folder)


def write_notes(config: Any, folder: Path) -> None:
    """Write what Hydra would write of a command into its folder; without Hydra, the configuration alone.

    Hydra itself would write over the notes of a run that is resumed before it is known whether it can be, and leave
    empty files where the disk is full.

    Args:
        config: a dataclass.
        folder: of the command.

    Raises:
        UnwritableError: they cannot be written; those from before are whole.
    """
    notes: dict[str, Any] = {"config": asdict(config)}
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        notes |= {"hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
    make_subfolder(folder / NOTES)
    for name, content in notes.items():
        with atomic_write(folder / NOTES / f"{name}.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")


def adapter_folder(path: str) -> Path | None:
    """The exported adapter that `path` means, by its folder or a file in it; None if it means something else."""
    given = Path(path)
    if given.is_file():
        return given.parent if given.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) else None
    return given if any((given / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)) else None


def locate(path: str, option: str) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `option=path` means: a run folder (its last one) or a file in it.

    With `resume=`, a run killed before its first checkpoint is one too; it starts from its beginning.

    Raises:
        UserError: neither of them, or a run that left no checkpoint.
    """
    given = Path(path)
    whole = Path(os.path.abspath(given))  # noqa: PTH100 (resolve() would leave the run by a link in it)
    run = whole.parent.parent if given.is_file() else given
    checkpoint = given if given.is_file() else given / CHECKPOINTS / LAST
    if not given.exists():
        raise UserError(f"{option}={path}: no such run folder or checkpoint")
    if adapter_folder(path):
        raise UserError(f"{option}={path}: an exported adapter; give the run that it was made of")
    if not (run / OVERRIDES).is_file():
        empty = "an empty folder, " if run.is_dir() and not any(run.iterdir()) else ""
        raise UserError(
            f"{option}={path}: {empty}not a run of `e3va train`; give its folder, or a file under its {CHECKPOINTS}/"
        )
    if not checkpoint.is_file() and option != "resume":
        raise UserError(f"{option}={path}: the run has no {CHECKPOINTS}/{LAST}: it stopped before its first one")
    return run, checkpoint


def config_of(run: Path) -> dict[str, Any] | None:
    """The plain configuration of a run; None for one that was killed before it was written."""
    path = run / CONFIG
    return cast("dict[str, Any]", _read_yaml(path, dict)) if path.is_file() else None


def write_overrides(run: Path, words: list[str]) -> None:
    """Keep the overrides that a run was started with, where Hydra does."""
    make_subfolder(run / NOTES)
    with atomic_write(run / OVERRIDES) as temporary:
        temporary.write_text(yaml.safe_dump(words, allow_unicode=True), encoding="utf-8")


def overrides_of(run: Path) -> list[str]:
    """The command-line overrides that a run was started with, nothing of them looked up."""
    path = run / OVERRIDES
    words = _read_yaml(path, list)
    if wrong := [word for word in words if not is_name(word)]:
        raise UserError(f"{path}: {shorten(wrong[0])} is no option")
    return cast("list[str]", words)


def _read_yaml(path: Path, kind: type) -> Any:
    """The plain content of a file that a run has left, which may come from anywhere; nothing in it is looked up.

    Raises:
        UserError: it cannot be read, holds something else, or repeats its own parts by name: a kilobyte of such
            repetitions can become gigabytes.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it repeats its own parts")
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML ({first_line(error)})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: it holds no {kind.__name__}; it is not as `e3va train` wrote it")
    return content
