"""Compose a command's configuration and report all errors at once, each with a suggestion."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from e3va_cli.components.options import idle_options, info_of, instantiate, walk
from e3va_cli.config.hydra_private import child_config
from e3va_cli.config.run_config import COMMANDS, NEEDED, RunConfig, errors_in, renamed_options, typed
from e3va_cli.errors import UserError, first_line

CONFIG_MODULE = "e3va_cli.conf"
SELECTORS = ("name", "family")  # set by `GROUP=`
CHOICES_INDENT: Any = {"initial_indent": "  ", "subsequent_indent": " " * 15}
HELP_WIDTH, HELP_COLUMN, MAX_OPTION_WIDTH = 78, 42, 60  # of `--help`, in characters


def parse(words: list[str]) -> list[Override]:
    """Parse command-line overrides.

    Raises:
        UserError: invalid overrides; lists all of them.
    """
    parser, overrides, errors = OverridesParser.create(), [], []
    for before, word in zip(["", *words], words, strict=False):
        try:
            overrides.append(parser.parse_override(word))
        except HydraException as error:
            errors.append(f"{word}: invalid override; {_suggest_override(before, word)} ({first_line(error)})")
    if errors:
        raise UserError(*errors)
    return overrides


def _suggest_override(before: str, word: str) -> str:
    """Return what to type instead of an invalid override, quoted for a shell."""
    key, equals, value = word.partition("=")
    if key and equals:
        return f"use {shlex.quote(f'{key}={QuotedString(value, Quote.single).with_quotes()}')}"
    if "=" in before:
        return f"use KEY=VALUE; if it belongs to the value before it, use {shlex.quote(f'{before} {word}')}"
    return "use KEY=VALUE"


def single_values(override: Override) -> Iterator[str]:
    """Yield the override, or for a sweep such as `adapter.rank=4,8` one override for each value."""
    if not override.is_sweep_override():
        yield override.input_line or ""
    elif override.is_discrete_sweep():
        for value in override.sweep_string_iterator():
            yield f"{override.get_key_element()}={value}"


def groups() -> dict[str, list[str]]:
    """Return the choices of each configuration group."""
    loader = GlobalHydra.instance().config_loader()
    names = loader.list_groups("")
    options = {name: loader.get_group_options(name, ObjectType.CONFIG) for name in names if name != "hydra"}
    return {
        group: [choice for choice in choices if not choice.endswith("_schema")] for group, choices in options.items()
    }


def unread_groups(config_name: str) -> tuple[str, ...]:
    """Return the groups that a command does not read."""
    unread: tuple[str, ...] = getattr(COMMANDS[config_name], "unread_groups", ())
    return unread


def options_as_text(config_name: str, overrides: Sequence[str]) -> str:
    """Return the choices and options of a command with their values under `overrides`, for its `--help`."""
    config: Any = typed(compose(config_name, overrides=list(overrides)), COMMANDS[config_name], complete=False)
    unread = unread_groups(config_name)
    listed = groups() if issubclass(COMMANDS[config_name], RunConfig) else {}
    columns = max(HELP_WIDTH, shutil.get_terminal_size().columns - 1)
    choices = [
        line
        for group, names in listed.items()
        if len(names) > 1 and group not in unread
        for line in textwrap.wrap(f"{group + '=':<13}{', '.join(names)}", columns, **CHOICES_INDENT)
    ]
    heading = ["Choices (GROUP=NAME):", "", *choices, ""] if choices else []
    heading.append("Options and their values (KEY=VALUE):")
    lines, group = [], ""
    shared = {one.name for one in fields(RunConfig)} if choices else set()  # listed after the command's own
    for key, value, one in sorted(walk(config), key=lambda option: option[0].split(".")[0] in shared):
        if one.name in SELECTORS or key.split(".")[0] in unread:
            continue
        if (head := key.rpartition(".")[0]) != group:
            group = head
            lines.append("")
        text = f"  {key}={as_value(value)}"
        if not info_of(one).help:
            lines.append(text)
            continue
        room = max(HELP_COLUMN, len(text) + 2) if len(text) < MAX_OPTION_WIDTH else HELP_COLUMN
        needed = "needed; " if value == MISSING else ""
        wrapped = textwrap.wrap(needed + info_of(one).help, columns - room)
        lines.append(text if len(text) >= MAX_OPTION_WIDTH else f"{text:<{room}}{wrapped.pop(0)}")
        lines += [" " * room + line for line in wrapped]
    return "\n".join([*heading, "", "\n".join(lines).strip("\n")])


def as_value(value: Any) -> str:
    """Return a value as text in an override."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(as_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {as_value(one)}' for key, one in value.items())}}}"
    return str(value)


def known_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration."""
    for key in map(str, cfg):
        yield f"{prefix}{key}"
        if (group := child_config(cfg, key)) is not None:
            yield from known_keys(group, f"{prefix}{key}.")


def format_override_error(config_name: str, override: Override, error: Exception, cfg: DictConfig) -> str:
    """Return the message on an override that Hydra refuses."""
    key, word = override.key_or_group, override.input_line
    names = [*groups(), *known_keys(cfg)]
    if key not in names:
        if current := renamed_options(config_name).get(key):
            return f"{word}: {key} is now called {current}"
        group = key.partition(".")[0]
        if owners := choices_with(config_name, key):
            current = OmegaConf.select(cfg, f"{group}.name")
            return f"{word}: unknown option {key} of {group}={current}; it is one of {group}={' or '.join(owners)}"
        near = get_close_matches(key, names, n=1) or [n for n in names if n.endswith(f".{key.split('.')[-1]}")][:1]
        hint = f"did you mean {near[0]}?" if near else "see --help for all of them"
        return f"{word}: unknown option {key}; {hint}"
    cause = error.__cause__ or error
    return f"{word}: {first_line(cause)}"


def choices_with(config_name: str, key: str) -> list[str]:
    """Return the choices of a dotted key's group that have this option."""
    group = key.partition(".")[0]
    composed = {choice: compose(config_name, overrides=[f"{group}={choice}"]) for choice in groups().get(group, [])}
    return [choice for choice, cfg in composed.items() if key in known_keys(cfg)]


def no_such_choice(group: str, value: str, choices: list[str]) -> str:
    """Return the message on an unknown choice of a group."""
    near = get_close_matches(value, choices, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={value}: no such {group}; {hint}choices: {', '.join(choices)}"


def validate_overrides(config_name: str, overrides: list[str], given: list[str] | None = None) -> None:
    """Compose a command's configuration under overrides and check it.

    Args:
        config_name: the command, such as `check_data`.
        overrides: such as `adapter.rank=8`.
        given: the overrides that the user gave, each of which must have an effect; all of them by default.

    Raises:
        UserError: one line for each error: unknown options and choices, wrong types, values out of range, values that
            exclude each other, options without effect.
    """
    parsed = parse(overrides)
    own = parsed if given is None else parse(given)
    refused = unread_groups(config_name) if getattr(COMMANDS[config_name], "refuses_unread", True) else ()
    command = config_name.replace("_", "-")
    unread = [
        f"{override.input_line}: e3va {command} does not read {group} options; remove it"
        for override in own
        if (group := override.key_or_group.split(".")[0]) in refused
    ]
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        unknown, parsed = _unknown_choices(parsed)
        try:
            sweep_free = [next(single_values(o), "") for o in parsed]
            cfg = compose(config_name, overrides=[word for word in sweep_free if word])
        except (HydraException, OmegaConfBaseException) as whole:
            raise UserError(*unread, *unknown, *(_one_by_one(config_name, parsed) or [first_line(whole)])) from None
        errors = [*unread, *unknown, *errors_in(cfg)]
        if not any(override.is_sweep_override() for override in parsed):
            keys = {o.key_or_group for o in own if not any(line.startswith(f"{o.key_or_group}=") for line in errors)}
            errors += idle_options(keys, instantiate(cfg, missing=None))
        for override in parsed:
            for word in list(single_values(override))[1:]:  # the other values of a sweep
                try:
                    errors += errors_in(compose(config_name, overrides=[*(w for w in sweep_free if w), word]))
                except (HydraException, OmegaConfBaseException) as error:
                    errors.append(format_override_error(config_name, parse([word])[0], error, cfg))
    if errors:
        raise UserError(*dict.fromkeys(errors))


def _unknown_choices(overrides: list[Override]) -> tuple[list[str], list[Override]]:
    """Return errors on unknown choices, which Hydra ignores in optional groups, and the other overrides."""
    choices, errors, others = groups(), [], []
    for override in overrides:
        group = override.key_or_group
        unknown = []
        if group in choices and not override.is_delete():
            values = [parse([word])[0].value() for word in single_values(override)]
            unknown = [value for value in values if str(value) not in choices[group]]
        if unknown:
            errors += [no_such_choice(group, str(value), choices[group]) for value in unknown]
        else:
            others.append(override)
    return errors, others


def _one_by_one(config_name: str, overrides: list[Override]) -> list[str]:
    """Return the errors of each override alone, composed with the valid choices, so that no error hides another."""
    errors: list[str] = []
    choices: list[str] = []
    cfg = compose(config_name)
    values = [parse([word])[0] for override in overrides for word in single_values(override)]
    for override in sorted(values, key=lambda o: o.key_or_group not in groups()):
        try:
            cfg = compose(config_name, overrides=[*choices, override.input_line or ""])
        except (HydraException, OmegaConfBaseException) as error:
            errors.append(format_override_error(config_name, override, error, cfg))
        else:
            errors += [error for error in errors_in(cfg) if not error.endswith(NEEDED)]
            if override.key_or_group in groups():
                choices.append(override.input_line or "")
    return errors


def load_config(command: str, overrides: Sequence[str] = (), *, complete: bool = True) -> Any:
    """Return the typed configuration of a command, such as `train`, under overrides.

    Args:
        command: `train`, `evaluate`, `predict`, `export_adapter`, `export`, `check_data` or `benchmark_memory`.
        overrides: such as `adapter.rank=8`.
        complete: raise a UserError if an option without default is missing, such as `dataset.root`.
    """
    hydra = (
        nullcontext() if GlobalHydra().is_initialized() else initialize_config_module(CONFIG_MODULE, version_base="1.3")
    )
    with hydra:
        return typed(compose(command, overrides=list(overrides)), COMMANDS[command], complete=complete)
