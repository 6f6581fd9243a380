"""How Hydra runs a command: its words, the checks before it, and errors as one line each."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from e3va_cli.composition import CONFIG_MODULE, checked, groups_as_text, parse
from e3va_cli.config import register_schemas
from e3va_cli.errors import UserError
from e3va_cli.run_folder import locate, overrides_of

CONTINUES = {
    "train": "resume",
    "evaluate": "checkpoint",
}  # commands that build on a run, and the option naming it


def refuse(error: UserError) -> NoReturn:
    """Print what the user can mend and leave with exit code 2."""
    for message in error.messages:
        print(f"e3va: error: {message}", file=sys.stderr)
    sys.exit(2)


def on_top_of_run(command: str, words: list[str]) -> list[str]:
    """Put the overrides of the run that `words` build on before them; the later ones win.

    A choice such as `dataset=coco` given anew also takes back what the run had set inside that group.
    """
    option = CONTINUES.get(command)
    given = {override.key_or_group: override for override in parse(words)}
    if option not in given:
        return words
    if given[option].is_sweep_override():
        raise UserError(f"{option}: one at a time; start the command once for each run")
    value = given[option].value()
    if value is None:
        return words
    run, _ = locate(str(value), str(option))
    kept = []
    for override in parse(overrides_of(run)):
        key = override.key_or_group
        if key not in given and key.split(".")[0] not in given and key not in ("resume", "checkpoint"):
            kept.append(override.input_line or "")
    if command == "train" and "hydra.run.dir" not in given:
        kept.append(f"hydra.run.dir='{run}'")
    return [*kept, *words]


def run(command: str) -> None:
    """Run `e3va command` with the words of `sys.argv` that follow it."""
    register_schemas()
    OmegaConf.register_new_resolver("choices", groups_as_text, replace=True)  # for the help templates of conf/
    given = list(sys.argv)
    config_name = command.replace("-", "_")
    flags = get_args_parser().parse_args(given[2:])
    asks_only = flags.help or flags.hydra_help or flags.shell_completion
    words = list(flags.overrides)
    try:
        if not asks_only:
            words = on_top_of_run(command, words)
            checked(config_name, words)
    except UserError as error:
        refuse(error)

    def task(cfg: DictConfig) -> None:
        sys.argv = given  # Lightning starts the other processes of a run with these words
        try:
            import_module(f"e3va_cli.commands.{config_name}").run(cfg)
        except UserError as error:
            refuse(error)

    options = [word for word in given[2:] if word not in flags.overrides]
    sys.argv = [given[0], *options, *words]
    hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name, version_base="1.3")(task)()
