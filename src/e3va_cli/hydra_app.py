"""How Hydra runs a command: its words, the checks before it, and errors as one line each."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from e3va_cli.command_line import as_value
from e3va_cli.composition import CONFIG_MODULE, checked, groups_as_text, parse, plain
from e3va_cli.config import register_schemas
from e3va_cli.config.legacy import LegacyWarning, fill_legacy_options, missing_options, warn_of_legacy_options
from e3va_cli.errors import UserError, print_mistakes
from e3va_cli.export.adapter_config import read_config
from e3va_cli.export.overrides import MODEL, evaluation_words, leaves, model_words
from e3va_cli.files import UNWRITABLE, UnwritableError
from e3va_cli.run_folder import (
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
from e3va_cli.run_lock import hold
from e3va_cli.sweep import Sweep

CONTINUES = {
    "train": "resume",
    "evaluate": "checkpoint",
}  # commands that build on a run, and the option naming it
NOTED = ("evaluate", "check-data", "benchmark-memory")  # that have a folder; train writes its notes itself
RECIPE = ("optimizer", "schedule", "trainer", "dataset")  # groups in which a run that goes on keeps its values
TOLD = ("dataset.num_classes",)  # by the data, whatever the default is
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
    """Put the overrides of the run or exported adapter at `place` before those that build on it; the later ones win.

    A choice such as `dataset=coco` given anew also takes back what the run had set inside that group, but not the
    trained model: that stays what it is.
    """
    given = {override.key_or_group for override in parse(words)}
    adapter = adapter_folder(place) if command == "evaluate" else None
    if adapter is not None:
        base = evaluation_words(fill_legacy_options(read_config(adapter)["config"]))
    else:
        run, _ = locate(place, CONTINUES[command])
        base = overrides_of(run)
        config = config_of(run)
        if config is not None:
            if command == "evaluate" and "dataset" in given:  # the head and more that the run's data set had chosen
                base = [word for word in base if _group(word) not in (*MODEL, "experiment")] + model_words(config)
            base += [f"{key}={as_value(value)}" for key, value in missing_options(config).items()]
            if command == "train":
                warn_of_legacy_options(place, config)
                base += recipe_words(base, config)
    taken_back = {*given, *(EITHER[key] for key in given if key in EITHER)}
    left_out = ("resume", "checkpoint") if command == "train" else ("resume", "checkpoint", "budget")
    kept = []
    for override in parse(base):
        key, word = override.key_or_group, override.input_line or ""
        if key in taken_back or key.split(".")[0] in given or key in left_out or is_of_hydra(key):
            continue
        if "${" in word:
            raise UserError(f"{place}: its {word} looks a value up on this machine; give {key}=VALUE")
        kept.append(word)
    if command == "train" and "hydra.run.dir" not in given:
        kept.append(f"hydra.run.dir={as_value(str(run))}")
    return [*kept, *words]


def recipe_words(words: list[str], config: dict[str, Any]) -> list[str]:
    """Overrides that keep a run's recipe, of which `words` and configuration are given, where defaults have changed."""
    words = [word for word in words if not is_of_hydra(_key(word)) and _key(word) != "resume"]
    if any("${" in word for word in words):
        return []  # which is refused
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            today = plain(compose("train", overrides=words), complete=False)
    except (HydraException, OmegaConfBaseException):
        return []  # what is wrong with the words is said when they are checked
    then, now = (
        {key: value for group in RECIPE if group in one for key, value in leaves(group, one[group])}
        for one in (config, today)
    )
    return [
        f"{key}={as_value(value)}"
        for key, value in then.items()
        if key in now and now[key] != value and key not in TOLD
    ]


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


def _group(word: str) -> str:
    return _key(word).split(".")[0]


def _key(word: str) -> str:
    return str(parse([word])[0].key_or_group)


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
    register_schemas()
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
    asks_only = flags.help or flags.hydra_help or flags.shell_completion
    words, *others = [list(flags.overrides)]
    try:
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
            if command in NOTED:
                write_notes(cfg, Path(HydraConfig.get().runtime.output_dir))
            further = [compose(config_name, overrides=one) for one in others]
            import_module(f"e3va_cli.commands.{config_name}").run(cfg, *further)

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
