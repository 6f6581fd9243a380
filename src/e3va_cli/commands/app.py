"""Run a command under Hydra: quote and validate its overrides, and report errors as one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from e3va_cli.commands.saved_config import referenced_runs, validate_each
from e3va_cli.commands.sweep import Sweep
from e3va_cli.config.composition import CONFIG_MODULE, load_config, options_as_text, parse
from e3va_cli.config.hydra_private import parse_arguments
from e3va_cli.config.quoting import quote_overrides
from e3va_cli.config.run_config import (
    COMMANDS,
    LegacyWarning,
    RunConfig,
    typed,
)
from e3va_cli.errors import UserError, print_errors
from e3va_cli.runs.folder import (
    check_unused,
    find_checkpoint,
    is_rank_zero,
    make_run_folder,
    remove_empty_run,
    write_hydra_config,
)
from e3va_cli.runs.lock import lock_folder
from e3va_cli.utils.files import UNWRITABLE, UnwritableError

NOTED = ("evaluate", "check-data", "benchmark-memory")  # that have a folder; train writes its notes itself


def exit_with_error(error: UserError) -> NoReturn:
    """Print an error and exit with code 2."""
    print_errors(error)
    sys.exit(2)


def check_run_dir(overrides: list[str], *, writes: bool) -> None:
    """Check that a training run does not overwrite another run.

    Only the first process of a run checks: the others find its files there.

    Args:
        overrides: of `e3va train`.
        writes: lock an existing folder before Hydra writes to it.

    Raises:
        UserError: `hydra.run.dir` holds another run.
    """
    given = {override.key_or_group: override for override in parse(overrides)}.get("hydra.run.dir")
    if given is not None and is_rank_zero():
        resumed = [find_checkpoint(place, "resume")[0] for place in referenced_runs("train", overrides)]
        folder = Path(str(given.value()))
        check_unused(folder, resumed[0] if resumed else None)
        if writes and folder.is_dir():
            lock_folder(folder)


@contextmanager
def notes_in_one_line() -> Iterator[None]:
    """Print each warning of old weights as one line, without its location in the code."""
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
    """Run `e3va command` with the arguments in `sys.argv`."""
    made: set[Path] = set()

    def folder_of_run(path: str) -> str:
        try:
            folder = make_run_folder(path)
        except UserError as error:
            exit_with_error(error)  # what a resolver raises, OmegaConf would wrap
        made.add(Path(folder).absolute())
        return folder

    OmegaConf.register_new_resolver("new_folder", folder_of_run, replace=True)  # for hydra.run.dir
    given = list(sys.argv)
    config_name = command.replace("-", "_")
    flags = parse_arguments(given[2:])
    OmegaConf.register_new_resolver(
        "options", lambda: options_as_text(config_name, flags.overrides), replace=True
    )  # for --help
    asks_only = flags.help or flags.hydra_help or flags.shell_completion
    overrides, *others = [list(flags.overrides)]
    try:
        overrides = quote_overrides(command, overrides, multirun=flags.multirun)
        if not asks_only:
            overrides, *others = validate_each(command, overrides)
            if command == "train" and not flags.multirun:
                check_run_dir(overrides, writes=not flags.cfg)
    except UserError as error:
        exit_with_error(error)

    sweep = Sweep(overrides)

    def task(cfg: DictConfig) -> None:
        sys.argv = given  # Lightning starts the other processes of a run with these arguments

        def job() -> None:
            further = [load_config(config_name, one) for one in others]
            kind = COMMANDS[config_name]
            config: Any = typed(cfg, kind, complete=getattr(kind, "reads_data", True))
            folder = {"folder": Path(HydraConfig.get().runtime.output_dir)} if issubclass(kind, RunConfig) else {}
            if command in NOTED:
                write_hydra_config(config, folder["folder"])
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
            if folder in made and is_rank_zero():
                remove_empty_run(folder)
            exit_with_error(
                error if isinstance(error, UserError) else UnwritableError(Path(error.filename or folder), error)
            )

    options = [word for word in given[2:] if word not in flags.overrides]
    sys.argv = [given[0], *options, *overrides]
    hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name, version_base="1.3")(task)()
