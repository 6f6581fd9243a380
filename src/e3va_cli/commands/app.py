"""How Hydra runs a command: its words, the checks before it, and errors as one line each."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from e3va_cli.commands.sweep import Sweep
from e3va_cli.config.composition import CONFIG_MODULE, checked, groups_as_text, load_config, options_as_text, parse
from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.config.quoting import quoted_words
from e3va_cli.config.run_config import (
    COMMANDS,
    LegacyWarning,
    RunConfig,
    typed,
    warn_of_legacy_options,
    with_older_options,
)
from e3va_cli.errors import UserError, print_mistakes
from e3va_cli.export.adapter_config import read_config
from e3va_cli.runs.folder import (
    adapter_folder,
    config_of,
    is_first_process,
    locate,
    new_folder,
    overrides_of,
    remove_unused,
    require_unused,
    write_notes,
)
from e3va_cli.runs.lock import hold
from e3va_cli.utils.command_line import as_value
from e3va_cli.utils.files import UNWRITABLE, UnwritableError

CONTINUES = {
    "train": "resume",
    "evaluate": "checkpoint",
}  # commands that build on a run, and the option naming it
NOTED = ("evaluate", "check-data", "benchmark-memory")  # that have a folder; train writes its notes itself
OF_TRAINING = ("optimizer", "schedule", "budget")  # that an evaluation does not depend on
MEASURED_WITH = ("precision", "limit_val_batches")  # of the trainer, that it does
LEFT_OUT = {"train": ("resume", "experiment"), "evaluate": ("checkpoint", "resume", "experiment", "budget")}
EITHER = {"backbone.weights": "backbone.pretrained", "backbone.pretrained": "backbone.weights"}


def refuse(error: UserError) -> NoReturn:
    """Print what the user can mend and leave with exit code 2."""
    print_mistakes(error)
    sys.exit(2)


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


def on_top_of_run(command: str, words: list[str], place: str) -> list[str]:
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
        base = overrides_of(run)
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


def each_checked(command: str, words: list[str]) -> list[list[str]]:
    """The checked words of the command; where it builds on runs, on top of those of each run.

    Raises:
        UserError: something is wrong with them; of several runs, names the one.
    """
    runs = named_runs(command, words)
    found = [on_top_of_run(command, words, place) for place in runs] or [words]
    for index, one in enumerate(found):
        try:
            checked(command.replace("-", "_"), one, typed=words)
        except UserError as error:
            where = f"{runs[index]}: " if len(runs) > 1 else ""
            raise UserError(*(f"{where}{message}" for message in error.messages)) from None
    return found


def require_place(words: list[str], *, writes: bool) -> None:
    """Raises UserError if the words of a training run would put it over another run.

    One that `writes` takes the lock of a folder that is there already, before Hydra leaves its notes in it.

    A further process of a run finds there what the first one has put there for it.
    """
    given = {override.key_or_group: override for override in parse(words)}.get("hydra.run.dir")
    if given is not None and is_first_process():
        resumed = [locate(place, "resume")[0] for place in named_runs("train", words)]
        folder = Path(str(given.value()))
        require_unused(folder, resumed[0] if resumed else None)
        if writes and folder.is_dir():
            hold(folder)


@contextmanager
def notes_in_one_line() -> Iterator[None]:
    """Within the block, print warnings of old weights as a line without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", LegacyWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *others: Any, **named: Any) -> None:
            if issubclass(category, LegacyWarning):
                print(f"e3va: note: {message}", file=sys.stderr, flush=True)
            else:
                usual(message, category, *others, **named)

        warnings.showwarning = cast(Any, show)
        yield


@notes_in_one_line()
def run(command: str) -> None:
    """Run `e3va command` with the words of `sys.argv` that follow it."""
    OmegaConf.register_new_resolver("choices", groups_as_text, replace=True)  # for the help templates of conf/
    made: set[Path] = set()

    def folder_of_run(path: str) -> str:
        try:
            folder = new_folder(path)
        except UserError as error:
            refuse(error)  # what a resolver raises, OmegaConf would wrap
        made.add(Path(folder).absolute())
        return folder

    OmegaConf.register_new_resolver("new_folder", folder_of_run, replace=True)  # for hydra.run.dir
    given = list(sys.argv)
    config_name = command.replace("-", "_")
    flags = get_args_parser().parse_args(given[2:])
    OmegaConf.register_new_resolver("options", lambda: options_as_text(config_name, flags.overrides), replace=True)
    asks_only = flags.help or flags.hydra_help or flags.shell_completion
    words, *others = [list(flags.overrides)]
    try:
        words = quoted_words(command, words, multirun=flags.multirun)
        if not asks_only:
            words, *others = each_checked(command, words)
            if command == "train" and not flags.multirun:
                require_place(words, writes=not flags.cfg)
    except UserError as error:
        refuse(error)

    sweep = Sweep(words)

    def task(cfg: DictConfig) -> None:
        sys.argv = given  # Lightning starts the other processes of a run with these words

        def job() -> None:
            further = [load_config(config_name, one) for one in others]
            kind = COMMANDS[config_name]
            config: Any = typed(cfg, kind, complete=getattr(kind, "reads_data", True))
            folder = {"folder": Path(HydraConfig.get().runtime.output_dir)} if issubclass(kind, RunConfig) else {}
            if command in NOTED:
                write_notes(config, folder["folder"])
            import_module(f"e3va_cli.commands.{config_name}").run(config, *further, **folder)

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweep.run(job)
            return
        try:
            job()
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in UNWRITABLE:
                raise
            folder = Path(HydraConfig.get().runtime.output_dir)
            if folder in made and is_first_process():
                remove_unused(folder)
            refuse(error if isinstance(error, UserError) else UnwritableError(Path(error.filename or folder), error))

    options = [word for word in given[2:] if word not in flags.overrides]
    sys.argv = [given[0], *options, *words]
    hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name, version_base="1.3")(task)()
