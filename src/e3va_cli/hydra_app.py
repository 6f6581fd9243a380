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
from e3va_cli.export.adapter_config import read_config
from e3va_cli.export.overrides import MODEL, evaluation_words, model_words
from e3va_cli.run_folder import adapter_folder, config_of, locate, overrides_of

CONTINUES = {
    "train": "resume",
    "evaluate": "checkpoint",
}  # commands that build on a run, and the option naming it
EITHER = {"backbone.weights": "backbone.pretrained", "backbone.pretrained": "backbone.weights"}


def refuse(error: UserError) -> NoReturn:
    """Print what the user can mend and leave with exit code 2."""
    for message in error.messages:
        print(f"e3va: error: {message}", file=sys.stderr)
    sys.exit(2)


def on_top_of_run(command: str, words: list[str]) -> list[str]:
    """Put the overrides of the run or exported adapter that `words` build on before them; the later ones win.

    A choice such as `dataset=coco` given anew also takes back what the run had set inside that group, but not the
    trained model: that stays what it is.
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
    if not isinstance(value, str | int | float):  # a folder may be called 7
        raise UserError(f"{option}={value}: one at a time; start the command once for each run")
    adapter = adapter_folder(str(value)) if command == "evaluate" else None
    if adapter is not None:
        base = evaluation_words(read_config(adapter)["config"])
    else:
        run, _ = locate(str(value), str(option))
        base = overrides_of(run)
        config = config_of(run) if command == "evaluate" and "dataset" in given else None
        if config is not None:  # the head and more that the run's data set had chosen
            base = [word for word in base if _group(word) not in (*MODEL, "experiment")] + model_words(config)
    taken_back = {*given, *(EITHER[key] for key in given if key in EITHER)}
    kept = []
    for override in parse(base):
        key = override.key_or_group
        if key not in taken_back and key.split(".")[0] not in given and key not in ("resume", "checkpoint"):
            kept.append(override.input_line or "")
    if command == "train" and "hydra.run.dir" not in given:
        kept.append(f"hydra.run.dir='{run}'")
    return [*kept, *words]


def _group(word: str) -> str:
    return str(parse([word])[0].key_or_group).split(".")[0]


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
