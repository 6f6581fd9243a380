"""Overrides on top of the saved configuration of a run or an exported adapter, whatever the defaults are now."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from e3va_cli.config.composition import parse, validate_overrides
from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.config.run_config import RunConfig, renamed_options, warn_of_legacy_options, with_older_options
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_config import read_config
from e3va_cli.runs.folder import adapter_folder, config_of, locate, overrides_of
from e3va_cli.utils.command_line import as_value

CONTINUES = {
    "train": "resume",
    "evaluate": "checkpoint",
}  # commands that build on a run, and the option naming it
OF_TRAINING = ("optimizer", "schedule", "budget")  # that an evaluation does not depend on
MEASURED_WITH = ("precision", "limit_val_batches")  # of the trainer, that it does
LEFT_OUT = {"train": ("resume", "experiment"), "evaluate": ("checkpoint", "resume", "experiment", "budget")}
EITHER = {"backbone.weights": "backbone.pretrained", "backbone.pretrained": "backbone.weights"}


def named_runs(command: str, words: list[str]) -> list[str]:
    """The runs or exported adapters that `words` build on: none, one, or for an evaluation several.

    Raises:
        UserError: several where one is needed, or something that is no name.
    """
    option = CONTINUES.get(command, "")
    overrides = parse(words)
    given = {override.key_or_group: override for override in overrides}.get(option)
    if given is None or (command == "train" and given.value() is None):
        return []
    value = given.value()
    runs = value if isinstance(value, list) and command == "evaluate" else [value]
    if not runs or not all(isinstance(one, str | int | float) for one in runs):  # a folder may be called 7
        kinds = "a run or an exported adapter, or a list such as [A,B]" if command == "evaluate" else "one run"
        raise UserError(f"{given.input_line}: {option} takes {kinds}")
    swept = [override.input_line for override in overrides if override.is_sweep_override()]
    if len(runs) > 1 and swept:
        raise UserError(f"{swept[0]}: one value at a time where several are evaluated together")
    return [str(one) for one in runs]


def with_saved_config(command: str, words: list[str], place: str) -> list[str]:
    """Return `words` on top of the configuration of the run or exported adapter at `place`, whatever defaults are now.

    A choice such as `dataset=coco` given anew also takes back what the run had set inside that group.
    """
    given = {override.key_or_group for override in parse(words)}
    adapter = adapter_folder(place) if command == "evaluate" else None
    if adapter is not None:
        config: dict[str, Any] | None = read_config(adapter)["config"]
    else:
        run, _ = locate(place, CONTINUES[command])
        config = config_of(run)
        if command == "train" and config is not None:
            warn_of_legacy_options(place, config)
    if config is None:  # of a run that was killed before it was written
        renamed = renamed_options(command)
        base = []
        for word in overrides_of(run):
            key, equals, value = word.partition("=")
            name = key.lstrip("+~")
            base.append(f"{key.removesuffix(name)}{renamed.get(name, name)}{equals}{value}")
    else:
        names = {one.name for one in fields(RunConfig)} | ({"budget"} if config.get("budget") else set())
        kept_parts = {key: value for key, value in with_older_options(config).items() if key in names}
        base = overrides_of_config(kept_parts if command == "train" else measured_with(kept_parts))
    taken_back = {*given, *(EITHER[key] for key in given if key in EITHER), *(("data",) if "dataset" in given else ())}
    kept = []
    for override in parse(base):
        key, word = override.key_or_group, override.input_line or ""
        if key in taken_back or key.split(".")[0] in taken_back or key in LEFT_OUT[command] or is_of_hydra(key):
            continue
        if "${" in word:
            raise UserError(f"{place}: its {word} looks a value up on this machine; give {key}=VALUE")
        kept.append(word)
    if command == "train" and "hydra.run.dir" not in given:
        kept.append(f"hydra.run.dir={as_value(str(run))}")
    return [*kept, *words]


def measured_with(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a plain configuration that an evaluation depends on: not on what machine it was trained."""
    trainer = {key: config["trainer"][key] for key in MEASURED_WITH if key in config["trainer"]}
    return {key: value for key, value in config.items() if key not in OF_TRAINING} | {"trainer": trainer}


def is_of_hydra(key: str) -> bool:
    """Whether an option is Hydra's own: those can name code to run, which a run from elsewhere must not."""
    return re.split("[./]", key)[0] == "hydra"


def validate_each(command: str, words: list[str]) -> list[list[str]]:
    """The checked words of the command; where it builds on runs, on top of those of each run.

    Raises:
        UserError: something is wrong with them; of several runs, names the one.
    """
    runs = named_runs(command, words)
    found = [with_saved_config(command, words, place) for place in runs] or [words]
    for index, one in enumerate(found):
        try:
            validate_overrides(command.replace("-", "_"), one, given=words)
        except UserError as error:
            where = f"{runs[index]}: " if len(runs) > 1 else ""
            raise UserError(*(f"{where}{message}" for message in error.messages)) from None
    return found
