"""Options as fields of dataclasses: type and default in the field, everything else about an option in its metadata.

A component declares its options once, in a dataclass beside its class. The schema that Hydra holds the YAML files to,
the checks of values, `--help` and what a checkpoint depends on are made from that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Final

from omegaconf import MISSING, DictConfig, OmegaConf

from e3va_cli.errors import UserError

INFO: Final = "info"  # the key of a field's metadata
MAX_SEED: Final = 2**32 - 1
UNCHANGED: Final = object()  # of an option as old as its component


@dataclass(frozen=True)
class Condition:
    """A condition on another option of the same dataclass under which an option is used, and the remedy if unmet."""

    option: str
    holds: Callable[[Any], bool]
    remedy: str


@dataclass(frozen=True)
class OptionInfo:
    """Metadata of an option besides its type and default.

    Attributes:
        help: one line for `--help`.
        gt, ge, lt, le: bounds of a number: greater than, greater or equal, less than, less or equal.
        choices: all allowed values.
        free: trained weights can be used with any value, whatever they were trained with.
        training_only: only used in training, not by trained weights.
        legacy_value: the value that older weights, from before the option existed, were trained with.
        former_name: name before a rename, which saved configurations may still have.
        conditions: conditions under which it is used; setting it is an error if one is not met.
    """

    help: str = ""
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[Any, ...] = ()
    free: bool = False
    training_only: bool = False
    legacy_value: Any = UNCHANGED
    former_name: str = ""
    conditions: tuple[Condition, ...] = ()

    def error(self, value: Any) -> str:
        """Return the error in a value, or an empty string."""
        if value is None or value == MISSING:
            return ""
        if self.choices:
            return "" if value in self.choices else f"one of {', '.join(str(one).lower() for one in self.choices)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ""
        if self.ge is not None and self.le is not None:
            return "" if self.ge <= value <= self.le else f"from {self.ge:g} to {self.le:.10g}"
        if self.ge is not None and self.lt is not None:
            return "" if self.ge <= value < self.lt else f"from {self.ge:g} to below {self.lt:g}"
        if self.gt is not None and self.le is not None:
            return "" if self.gt < value <= self.le else f"above {self.gt:g} and at most {self.le:g}"
        if self.gt is not None:
            return "" if value > self.gt else f"must be above {self.gt:g}"
        if self.ge is not None:
            return "" if value >= self.ge else f"must be {self.ge:g} or above"
        return ""


def option(default: Any = MISSING, help: str = "", **info: Any) -> Any:
    """Declare an option.

    Args:
        default: value if the YAML has none; a list or dict is copied, a dataclass is a group of options.
        help: one line for `--help`.
        info: further attributes of `OptionInfo`.
    """
    metadata = {INFO: OptionInfo(help=help, **info)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def info_of(one: Field[Any]) -> OptionInfo:
    """Return the metadata of an option."""
    known = one.metadata.get(INFO)
    return known if isinstance(known, OptionInfo) else OptionInfo()


def group_of(one: Field[Any]) -> type | None:
    """Return the dataclass of a field that is a group of options."""
    made = one.default_factory
    return made if isinstance(made, type) and is_dataclass(made) else None


@dataclass
class Options:
    """A group of options that belong together."""

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in the combination of options, one line each; missing values are None.

        The methods of all base classes are called. `at` is the group's dotted key.
        """
        return iter(())


def instantiate(node: Any, *, missing: Any = MISSING) -> Any:
    """Return a composed configuration as dataclasses, plain lists and dicts; `missing` stands for missing values."""
    if not isinstance(node, DictConfig) or not is_dataclass(kind := OmegaConf.get_type(node)):
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return kind(
        **{
            str(key): missing if OmegaConf.is_missing(node, key) else instantiate(node[key], missing=missing)
            for key in node
        }
    )


def walk(options: Any, at: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield every option below a dataclass that is no group: dotted key, value and field."""
    for one in fields(options):
        key, value = f"{at}{one.name}", getattr(options, one.name)
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
        else:
            yield key, value, one


def groups_in(options: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a dataclass and all dataclasses below it with their dotted keys."""
    yield at, options
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            yield from groups_in(value, f"{at}.{one.name}" if at else one.name)


def errors_of(options: Any, at: str = "") -> Iterator[str]:
    """Yield every error of options that types alone do not show, missing values being None, one line each."""
    for key, value, one in walk(options, f"{at}." if at else ""):
        if error := info_of(one).error(value):
            yield f"{key}={str(value).lower() if isinstance(value, bool) else value}: {error}"
    for key, group in groups_in(options, at):
        for kind in type(group).__mro__:
            if issubclass(kind, Options) and "errors" in vars(kind):
                yield from kind.errors(group, key)


def require_valid(options: Any, at: str = "") -> None:
    """Raise UserError with one line for each error of a dataclass of options, whose dotted key is `at`."""
    if errors := list(errors_of(options, at)):
        raise UserError(*errors)


def idle_options(given: set[str], options: Any) -> Iterator[str]:
    """Yield one line for each option of the dotted keys `given` that does nothing, missing values being None."""
    owners = dict(groups_in(options))
    for key, value, one in walk(options):
        if key not in given or value is None:
            continue
        path = key.rpartition(".")[0]
        for condition in info_of(one).conditions:
            other = getattr(owners[path], condition.option)
            if not condition.holds(other):
                name = f"{path}.{condition.option}" if path else condition.option
                written = "null" if other is None else str(other).lower() if isinstance(other, bool) else other
                yield (f"{key}={value}: does nothing with {name}={written}: {condition.remedy}, or leave out {key}")


def binding_options(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of plain options, nested ones too, that trained weights depend on; unknown ones count as such."""
    declared = {one.name: one for one in fields(kind)}
    binding: dict[str, Any] = {}
    for name, value in options.items():
        one = declared.get(name)
        if one is not None and info_of(one).free:
            continue
        group = None if one is None else group_of(one)
        binding[name] = binding_options(group, value) if group and isinstance(value, dict) else value
    return binding


def older_options(kind: type, options: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield the options that plain ones lack and are younger than they: dotted key, value before, and field.

    `at` is what the keys begin with, such as `head.`.
    """
    for one in fields(kind):
        known, group = info_of(one), group_of(one)
        if one.name not in options:
            if known.legacy_value is not UNCHANGED:
                yield f"{at}{one.name}", copy.deepcopy(known.legacy_value), one
        elif group and isinstance(options[one.name], dict):
            yield from older_options(group, options[one.name], f"{at}{one.name}.")


def with_current_names(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return plain options, nested ones too, under their current names."""
    declared = {name: one for one in fields(kind) for name in (one.name, info_of(one).former_name) if name}
    renamed: dict[str, Any] = {}
    for name, value in options.items():
        one = declared.get(name)
        group = None if one is None else group_of(one)
        current = name if one is None or one.name in options else one.name
        renamed[current] = with_current_names(group, value) if group and isinstance(value, dict) else value
    return renamed
