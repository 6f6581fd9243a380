"""The registry of components: what each configuration group can choose from, with the dataclass of its options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from hydra.core.config_store import ConfigStore

Component = TypeVar("Component")
Added = TypeVar("Added")


class Registry(Generic[Component]):
    """Components of one configuration group by name, such as tuning methods.

    Args:
        group: of Hydra, such as `adapter`; `adapter=NAME` chooses the YAML file, its `name` the component.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._components: dict[str, Component] = {}
        self._options: dict[str, type] = {}

    def register(self, name: str, options: type | None = None) -> Callable[[Added], Added]:
        """Return a decorator that adds a component under `name`; `NAME_schema` is what its YAML file is held to.

        Args:
            options: the dataclass of its options; the component itself, if it is one.
        """

        def add(component: Added) -> Added:
            kind = options or component
            assert isinstance(kind, type)
            self._components[name] = component  # type: ignore[assignment]
            self._options[name] = kind
            ConfigStore.instance().store(name=f"{name}_schema", node=kind, group=self.group)
            return component

        return add

    def __getitem__(self, name: str) -> Component:
        return self._components[name]

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def items(self) -> Iterator[tuple[str, Component]]:
        """Yield all names with their components."""
        return iter(self._components.items())

    def options(self, name: str) -> type | None:
        """Return the dataclass of a component's options; None of an unknown one."""
        return self._options.get(name)
