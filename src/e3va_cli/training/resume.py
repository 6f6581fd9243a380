"""A checkpoint that a run goes on from, and what is not as it was: data, seed, batches, optimizer and schedule."""

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
from e3va_cli.training.run import TrainingRun
from e3va_cli.utils.command_line import to_override_value

SAID = re.compile(  # options that training depends on; where the data lie is none, what they hold is told apart
    r"seed|data\.batch_size|optimizer\..+|schedule\.(?!epochs|min_steps|iterations).+"
    r"|trainer\.(accumulate_grad_batches|devices|num_nodes|precision|gradient_clip_norm|limit_train_batches)"
    r"|dataset\.(?!root$|(train|val)_(images|annotations|labels|set)$|num_classes$).+"
)
CONSEQUENCES = {
    "seed": "images come in another order, with other random transforms",
    "data.batch_size": "steps of an epoch and the learning rate follow, as the schedule above says",
    "trainer.accumulate_grad_batches": "steps of an epoch and the learning rate follow, as the schedule above says",
    "trainer.devices": "steps of an epoch and the learning rate follow, as the schedule above says",
}
GROUPS = "optimizer.decay_biases"  # decides which parameters share a state


@dataclass(frozen=True)
class ResumeCheckpoint:
    """A checkpoint that a run goes on from.

    Attributes:
        path: of the file.
        step: optimizer steps that made it.
        epochs: that were completed.
        changes: a line for each thing that the run goes on with that the checkpoint was not made with.
    """

    path: Path
    step: int
    epochs: int
    changes: list[str]


def read_resume_checkpoint(path: Path, run: TrainingRun, config: RunConfig) -> ResumeCheckpoint:
    """Read the checkpoint that a run goes on from.

    Raises:
        UserError: unreadable, or of another backbone, method, head, classes or groups of the optimizer.
    """
    content = read_checkpoint(path)
    check_metadata(content, path, run.lightning_module.metadata)
    check_param_groups(content, config)
    state = {name.removeprefix(MODEL_PREFIX): value for name, value in content["state_dict"].items()}
    check_state_dict(state, run.model, path)
    check_optimizer_state(content, run.lightning_module.build_optimizer(run.model), path)
    try:
        epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"][
            "processed"
        ]  # completed only after it was saved
    except (KeyError, TypeError):
        raise UserError(f"{path}: it does not tell how far the run came; the file is damaged") from None
    return ResumeCheckpoint(
        path, content["global_step"], epochs, list(config_changes(content, config, run.lightning_module.data))
    )


def config_changes(checkpoint: dict[str, Any], config: RunConfig, data: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Return a line for each thing that a resumed run goes on with that its checkpoint was not made with.

    Args:
        checkpoint: that is resumed.
        config: to go on with.
        data: the fingerprint of each split now.
    """
    before = checkpoint.get(FINGERPRINTS_KEY) or {}  # none in a checkpoint of an older e3va
    for split, now in data.items():
        if split in before:
            for change in Fingerprint(**now).changes(before[split]):
                yield f"dataset: {split} has {change}; results before and after are of different data"
    was, now_ = (
        dict(_leaves(one)) for one in (with_older_options(checkpoint[METADATA_KEY]["config"]), to_dict(config))
    )
    for key in now_:
        if key in was and was[key] != now_[key] and SAID.fullmatch(key):
            so = f"; {CONSEQUENCES[key]}" if key in CONSEQUENCES else ""
            yield f"{key}={to_override_value(now_[key])}, {to_override_value(was[key])} before{so}"


def check_param_groups(checkpoint: dict[str, Any], config: RunConfig) -> None:
    """Raises UserError where the state of the optimizer belongs to other groups of parameters."""
    was = with_older_options(checkpoint[METADATA_KEY]["config"])["optimizer"]["decay_biases"]
    now = config.optimizer.decay_biases
    if was != now:
        given, saved = (f"{GROUPS}={to_override_value(one)}" for one in (now, was))
        raise UserError(
            f"{given}: the run was started with {saved}, and the state of its optimizer has other parameter groups; "
            f"use {saved}, or start a new run"
        )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, list(value) if isinstance(value, tuple) else value
