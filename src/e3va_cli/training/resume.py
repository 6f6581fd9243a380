"""Resuming: the checkpoint that a run continues, and the options and data that have changed since."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3va_cli.config.run_config import RunConfig, to_dict, with_older_options
from e3va_cli.data.fingerprint import Fingerprint
from e3va_cli.errors import UserError
from e3va_cli.training.checkpoints import (
    FINGERPRINTS_KEY,
    METADATA_KEY,
    MODEL_PREFIX,
    check_metadata,
    check_optimizer_state,
    check_state_dict,
    read_checkpoint,
)
from e3va_cli.training.lightning_private import completed_epochs
from e3va_cli.training.run import TrainingRun
from e3va_cli.utils.command_line import to_override_value

REPORTED = re.compile(  # options that training depends on; not where the data are, whose contents are compared
    r"seed|data\.batch_size|optimizer\..+|schedule\.(?!epochs|min_steps|iterations).+"
    r"|trainer\.(accumulate_grad_batches|devices|num_nodes|precision|gradient_clip_norm|limit_train_batches)"
    r"|dataset\.(?!root$|(train|val)_(images|annotations|labels|set)$|num_classes$).+"
)
NEW_SCHEDULE = "the steps of an epoch and the learning rate change, see the schedule above"
CONSEQUENCES = {
    "seed": "the order of images and the random transforms change",
    "data.batch_size": NEW_SCHEDULE,
    "trainer.accumulate_grad_batches": NEW_SCHEDULE,
    "trainer.devices": NEW_SCHEDULE,
}


@dataclass(frozen=True)
class ResumeCheckpoint:
    """The checkpoint that a run continues.

    Attributes:
        path: of the file.
        step: number of optimizer steps done.
        epochs: number of epochs completed.
        changes: a line for each change of options or data since the checkpoint was saved.
    """

    path: Path
    step: int
    epochs: int
    changes: list[str]


def read_resume_checkpoint(path: Path, run: TrainingRun, config: RunConfig) -> ResumeCheckpoint:
    """Read and check the checkpoint that a run continues.

    Raises:
        UserError: it cannot be read, or is of another backbone, method, head, classes or parameter groups.
    """
    content = read_checkpoint(path)
    check_metadata(content, path, run.checkpoint_contents[METADATA_KEY])
    check_param_groups(content, config)
    state = {name.removeprefix(MODEL_PREFIX): value for name, value in content["state_dict"].items()}
    check_state_dict(state, run.model, path)
    check_optimizer_state(content, run.lightning_module.build_optimizer(run.model), path)
    try:
        epochs = completed_epochs(content)
    except (LookupError, TypeError):
        raise UserError(f"{path}: no number of completed epochs in the checkpoint; the file is damaged") from None
    changes = config_changes(content, config, run.checkpoint_contents[FINGERPRINTS_KEY])
    return ResumeCheckpoint(path, content["global_step"], epochs, list(changes))


def config_changes(
    checkpoint: dict[str, Any], config: RunConfig, fingerprints: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Yield a line for each option and split of the data that has changed since a checkpoint was saved.

    Args:
        checkpoint: to be resumed.
        config: of the resumed run.
        fingerprints: of its data, by split.
    """
    before = checkpoint.get(FINGERPRINTS_KEY) or {}  # older checkpoints have none
    for split, now in fingerprints.items():
        if split in before:
            for change in Fingerprint(**now).changes(before[split]):
                yield f"dataset: {split} has {change}; results before and after are of different data"
    was, now_ = (
        dict(_leaves(one)) for one in (with_older_options(checkpoint[METADATA_KEY]["config"]), to_dict(config))
    )
    for key in now_:
        if key in was and was[key] != now_[key] and REPORTED.fullmatch(key):
            consequence = f": {CONSEQUENCES[key]}" if key in CONSEQUENCES else ""
            yield f"{key}={to_override_value(now_[key])} (was {to_override_value(was[key])}){consequence}"


def check_param_groups(checkpoint: dict[str, Any], config: RunConfig) -> None:
    """Check that the optimizer of a checkpoint has the parameter groups of `config`.

    Raises:
        UserError: it has others.
    """
    options = with_older_options(checkpoint[METADATA_KEY]["config"])["optimizer"]
    for name, groups in (("decay_biases", bool), ("adapter_lr_scale", lambda scale: scale != 1)):
        was, now = options[name], getattr(config.optimizer, name)
        if groups(was) != groups(now):
            given, saved = (f"optimizer.{name}={to_override_value(one)}" for one in (now, was))
            raise UserError(
                f"{given}: the run was started with {saved}, and the state of its optimizer has other parameter "
                f"groups; use {saved}, or start a new run"
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, list(value) if isinstance(value, tuple) else value
