"""Overrides merged onto the saved configuration of a run or an exported adapter, independent of current defaults."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from e3va_cli.config.composition import parse, validate_overrides
from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.config.run_config import RunConfig, renamed_options, warn_of_legacy_options, with_older_options
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_config import read_config
from e3va_cli.runs.folder import find_adapter_folder, find_checkpoint, read_overrides, read_run_config
from e3va_cli.utils.command_line import to_override_value

CONTINUES = {
    "train": "resume",
    "evaluate": "checkpoint",
}  # commands that build on a run, and the option naming it
OF_TRAINING = ("optimizer", "schedule", "budget", "init_from")  # that an evaluation does not depend on
MEASURED_WITH = ("precision", "limit_val_batches")  # of the trainer, that it does
LEFT_OUT = {
    "train": ("resume", "experiment"),
    "evaluate": ("checkpoint", "resume", "experiment", "budget", "init_from"),
}
KEPT = ("budget", "init_from")  # of the options of `e3va train` itself, in the run that it resumes
EITHER = {"backbone.weights": "backbone.pretrained", "backbone.pretrained": "backbone.weights"}


def referenced_runs(command: str, overrides: list[str]) -> list[str]:
    """Return the runs or exported adapters that overrides refer to: none, one, or for an evaluation several.

    Raises:
        UserError: several where one is needed, or a value that is no name.
    """
    option = CONTINUES.get(command, "")
    parsed = parse(overrides)
    given = {override.key_or_group: override for override in parsed}.get(option)
    if given is None or (command == "train" and given.value() is None):
        return []
    value = given.value()
    runs = value if isinstance(value, list) and command == "evaluate" else [value]
    if not runs or not all(isinstance(one, str | int | float) for one in runs):  # a folder may be called 7
        kinds = "a run or an exported adapter, or a list such as [A,B]" if command == "evaluate" else "one run"
        raise UserError(f"{given.input_line}: {option} takes {kinds}")
    swept = [override.input_line for override in parsed if override.is_sweep_override()]
    if len(runs) > 1 and swept:
        raise UserError(f"{swept[0]}: one value at a time where several are evaluated together")
    return [str(one) for one in runs]


def with_saved_config(command: str, given: list[str], place: str) -> list[str]:
    """Return overrides that compose the saved configuration of the run or exported adapter at `place`, then `given`.

    A choice such as `dataset=coco` in `given` resets the run's options of that group.

    Raises:
        UserError: there is no run or adapter, its configuration cannot be used, or `init_from` is given for a run that
            is resumed.
    """
    given_keys = {override.key_or_group for override in parse(given)}
    if command == "train" and "init_from" in given_keys:
        raise UserError(
            f"init_from and resume={place}: a resumed run continues with its own weights; remove init_from, or remove "
            "resume to start a new run"
        )
    adapter = find_adapter_folder(place) if command == "evaluate" else None
    if adapter is not None:
        config: dict[str, Any] | None = read_config(adapter)["config"]
    else:
        run, _ = find_checkpoint(place, CONTINUES[command])
        config = read_run_config(run)
        if command == "train" and config is not None:
            warn_of_legacy_options(place, config)
    if config is None:  # of a run that was killed before it was written
        renamed = renamed_options(command)
        base = []
        for word in read_overrides(run):
            key, equals, value = word.partition("=")
            name = key.lstrip("+~")
            base.append(f"{key.removesuffix(name)}{renamed.get(name, name)}{equals}{value}")
    else:
        names = {one.name for one in fields(RunConfig)} | {name for name in KEPT if config.get(name)}
        kept_parts = {key: value for key, value in with_older_options(config).items() if key in names}
        base = overrides_of_config(kept_parts if command == "train" else evaluation_options(kept_parts))
    reset = {*given_keys, *(EITHER[key] for key in given_keys if key in EITHER)}
    if "dataset" in given_keys:
        reset.add("data")
    kept = []
    for override in parse(base):
        key, text = override.key_or_group, override.input_line or ""
        if key in reset or key.split(".")[0] in reset or key in LEFT_OUT[command] or is_of_hydra(key):
            continue
        if "${" in text:
            raise UserError(f"{place}: its {text} looks a value up on this machine; give {key}=VALUE")
        kept.append(text)
    if command == "train" and "hydra.run.dir" not in given_keys:
        kept.append(f"hydra.run.dir={to_override_value(str(run))}")
    return [*kept, *given]


def evaluation_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a plain configuration that an evaluation depends on: not on what machine it was trained."""
    trainer = {key: config["trainer"][key] for key in MEASURED_WITH if key in config["trainer"]}
    return {key: value for key, value in config.items() if key not in OF_TRAINING} | {"trainer": trainer}


def is_of_hydra(key: str) -> bool:
    """Return whether an option is Hydra's own; those can name code to run, which a saved run must not."""
    return re.split("[./]", key)[0] == "hydra"


def validate_each(command: str, overrides: list[str]) -> list[list[str]]:
    """Return validated overrides of a command, once for each run that it refers to, merged onto the run's own.

    Raises:
        UserError: as `validate_overrides`; names the run if there are several.
    """
    runs = referenced_runs(command, overrides)
    merged = [with_saved_config(command, overrides, place) for place in runs] or [overrides]
    for index, one in enumerate(merged):
        try:
            validate_overrides(command.replace("-", "_"), one, given=overrides)
        except UserError as error:
            where = f"{runs[index]}: " if len(runs) > 1 else ""
            raise UserError(*(f"{where}{message}" for message in error.messages)) from None
    return merged
