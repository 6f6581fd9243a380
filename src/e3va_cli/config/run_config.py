"""The whole configuration of each command, typed: what Hydra composes, what a run keeps, what all code is given."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from dataclasses import Field, dataclass
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from e3va_cli.components.options import (
    MAX_SEED,
    Condition,
    Options,
    errors_of,
    group_of,
    info_of,
    instantiate,
    older_options,
    option,
    with_current_names,
)
from e3va_cli.components.registry import Registry
from e3va_cli.config.trainer import TrainerOptions
from e3va_cli.data import DATASET_FORMATS, DatasetFormat, LoaderOptions
from e3va_cli.errors import UserError, first_line
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones import BACKBONES
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import ModelConfig
from e3va_cli.optim.lr_schedules import SCHEDULES
from e3va_cli.optim.optimizer import OptimizerOptions
from e3va_cli.optim.train_schedule import ScheduleOptions
from e3va_cli.utils.text import truncate_list

NEEDED = "a value is needed"
COMPUTED_IN = {"16-mixed": "float16", "bf16-mixed": "bfloat16"}
EXPORT_PRECISIONS = ("fp32", "fp16")
LENGTHS = ("trainer.max_epochs", "schedule.epochs", "schedule.iterations")
ONLY_MEASURED = (Condition("measure", lambda value: value is not False, "plans have no steps; set measure=true"),)
REGISTRIES: dict[str, Registry[Any]] = {
    registry.group: registry for registry in (BACKBONES, METHODS, HEADS, DATASET_FORMATS, SCHEDULES)
}
SINGLE: dict[str, type] = {"data": LoaderOptions, "optimizer": OptimizerOptions, "trainer": TrainerOptions}
LISTED = 4


@dataclass
class RunConfig(ModelConfig):
    """Everything that a run depends on."""

    reads_data: ClassVar[bool] = True
    unread_groups: ClassVar[tuple[str, ...]] = ()  # not listed in --help
    refuses_unread: ClassVar[bool] = True  # whether an override of an unread group is an error

    dataset: DatasetFormat = option()
    data: LoaderOptions = option()
    optimizer: OptimizerOptions = option()
    schedule: ScheduleOptions = option()
    trainer: TrainerOptions = option()
    seed: int = option(
        help="of the order of images, transforms, and what is drawn at random inside a step", ge=0, le=MAX_SEED
    )
    num_visualizations: int = option(
        help="validation images drawn with predictions, or with their annotations; 0 for none",
        ge=0,
        former_name="pictures",
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what does not go together."""
        precision, dtype = self.trainer.precision, self.backbone.dtype
        computed_in = COMPUTED_IN.get(str(precision))
        if computed_in and dtype in set(COMPUTED_IN.values()) - {computed_in}:
            yield (
                f"backbone.dtype={dtype} does not go with trainer.precision={precision}; choose "
                f"backbone.dtype={computed_in} or float32, or trainer.precision=32"
            )
        lengths = (self.trainer.max_epochs, self.schedule.epochs, self.schedule.iterations)
        if self.reads_data and "schedule" not in self.unread_groups and all(length is None for length in lengths):
            yield f"trainer.max_epochs=null: set one of {', '.join(LENGTHS)}"


@dataclass
class TrainConfig(RunConfig):
    """`e3va train`."""

    resume: str | None = option(None, help="a run folder: go on where it stopped")
    init_from: str | None = option(
        None, help="a run folder, a checkpoint in it, or an exported adapter: start from its weights"
    )
    budget: str | None = option(
        None, help="such as 11GiB (2^30 bytes each): refuse a run that cannot fit, before anything is loaded"
    )


@dataclass
class EvaluateConfig(RunConfig):
    """`e3va evaluate`."""

    unread_groups: ClassVar[tuple[str, ...]] = ("optimizer", "schedule")

    checkpoint: Any = option(help="a run folder, a checkpoint in it, or an exported adapter; or a list of them")


@dataclass
class CheckDataConfig(RunConfig):
    """`e3va check-data`, which takes the overrides of a training command."""

    unread_groups: ClassVar[tuple[str, ...]] = ("optimizer", "schedule")
    refuses_unread: ClassVar[bool] = False


@dataclass
class BenchmarkMemoryConfig(RunConfig):
    """`e3va benchmark-memory`."""

    reads_data: ClassVar[bool] = False

    methods: list[str] = option(help="any of `adapter=`")
    image_size: list[int] | None = option(
        None, help="[height,width] in pixels; null: the largest that the data set's training sizes allow"
    )
    instances_per_image: int = option(
        help="annotated objects in each image; COCO has 7 on average, and 100 in its most crowded images", gt=0
    )
    measure: Any = option(
        help="true: run real steps here; false: plan on shapes; auto: measure where there is a GPU",
        choices=("auto", True, False),
    )
    warmup: int = option(help="warm-up steps, not timed", ge=0, conditions=ONLY_MEASURED)
    repeats: int = option(help="timed steps", gt=0, conditions=ONLY_MEASURED)
    budget: str | None = option(
        None,
        help="such as 11GiB: says which methods fit, and the largest batch that does; caps a measurement on a GPU",
    )
    reserve_mib: float = option(
        help="of the budget, for CUDA's context, workspaces of convolutions and fragmentation", ge=0
    )
    claims: bool | None = option(
        None,
        help="compare with the paper's claims, exit code 1 if one fails; null: with an experiment of the paper",
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the size."""
        return image_size_errors(self.image_size)


@dataclass
class MovedBackbone(Options):
    """Weights of a trained adapter's backbone, if not at the path of the training run."""

    weights: str | None = option(None, help="file with the backbone's weights, if not at the path of training")
    pretrained: bool | None = option(None, help="true: timm's instead of a file")


@dataclass
class PredictConfig(Options):
    """`e3va predict`."""

    checkpoint: Any = option(help="a run folder, a checkpoint in it, or an exported adapter; or a list of them")
    input: Any = option(help="an image, a folder, a pattern such as 'photos/*.jpg', or a list of them")
    output: str | None = option(
        None, help="folder for the results; nothing in it is overwritten; null: a new one under runs/"
    )
    score_threshold: float = option(
        former_name="score", help="least score of an object that is drawn and written", ge=0, le=1
    )
    batch_size: int = option(help="images at once; memory grows with it", gt=0)
    accelerator: str = option(help="gpu, cpu, or auto for a gpu if there is one", choices=("auto", "cpu", "gpu"))
    save_images: bool = option(former_name="pictures", help="draw the predictions")
    backbone: MovedBackbone = option(MovedBackbone)


@dataclass
class ExportAdapterConfig(Options):
    """`e3va export-adapter`."""

    checkpoint: str = option(help="a run folder or a checkpoint in it")
    output: str | None = option(None, help="the folder to make")
    precision: str = option(help="fp16 halves the file", choices=EXPORT_PRECISIONS)


@dataclass
class ExportConfig(Options):
    """`e3va export`."""

    checkpoint: str = option(help="a run folder, a checkpoint in it, or an exported adapter")
    output: str | None = option(None, help="the file to make: .onnx, or .pt2 for a program of torch.export")
    image_size: list[int] | None = option(
        None, help="[height,width] of every image that the file is used on, in pixels; multiples of 32; needed"
    )
    tolerance: float = option(help="a file whose results differ more than this from PyTorch's is not kept", ge=0)
    backbone: MovedBackbone = option(MovedBackbone)

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the size."""
        return image_size_errors(self.image_size)


COMMANDS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "export_adapter": ExportAdapterConfig,
    "export": ExportConfig,
    "check_data": CheckDataConfig,
    "benchmark_memory": BenchmarkMemoryConfig,
}


def _register() -> None:
    """Tell Hydra the types that the YAML files are held to; components have told theirs."""
    store = ConfigStore.instance()
    for name, kind in COMMANDS.items():
        store.store(name=f"{name}_schema", node=kind)
    for name, group in (("loader", "data"), ("adamw", "optimizer"), ("lightning", "trainer")):
        store.store(name=f"{name}_schema", node=SINGLE[group], group=group)


_register()


def declared_options(kind: type, at: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield every option that a command can take, of all components: dotted key, field and type."""
    hints = get_type_hints(kind)
    for one in dataclasses.fields(kind):
        group = group_of(one)
        registry = REGISTRIES.get(one.name) if not at and group is None else None
        groups = (
            [registry.options(name) for name in registry]
            if registry
            else [group or (SINGLE.get(one.name) if not at else None)]
        )
        for inner in filter(None, groups):
            yield from declared_options(inner, f"{at}{one.name}.")
        yield f"{at}{one.name}", one, hints[one.name]


def image_size_errors(size: list[int] | None) -> Iterator[str]:
    """Yield what is wrong with the option `image_size`."""
    if size is not None and (len(size) != 2 or min(size) < 32):
        yield f"image_size={size}: [height,width] in pixels, at least 32 each"


def errors_in(cfg: DictConfig) -> list[str]:
    """Return every error that types alone do not show, one line each, naming the option and what would be right."""
    kind = OmegaConf.get_type(cfg)
    optional = () if getattr(kind, "reads_data", True) else ("dataset.root",)
    needed = [f"{key}: {NEEDED}" for key in sorted(OmegaConf.missing_keys(cfg)) if key not in optional]
    return needed + list(errors_of(instantiate(cfg, missing=None)))


Kind = TypeVar("Kind", bound=Options)


def typed(cfg: DictConfig, kind: type[Kind], *, complete: bool = True) -> Kind:
    """Return a composed configuration as its dataclass; unless `complete`, values may be missing (`???`).

    Raises:
        UserError: values are missing.
    """
    if complete and (missing := sorted(OmegaConf.missing_keys(cfg))):
        raise UserError(*(f"{key}: {NEEDED}" for key in missing))
    config = instantiate(cfg)
    assert isinstance(config, kind)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass of options as plain dictionaries, lists and values; of a command, what a run depends on."""
    whole = dataclasses.asdict(config)
    if not isinstance(config, RunConfig):
        return whole
    return {one.name: whole[one.name] for one in dataclasses.fields(RunConfig)}


def kind_of(group: str, options: dict[str, Any]) -> type | None:
    """Return the dataclass of plain options of a group; None if no component has that name."""
    if group not in REGISTRIES:
        return SINGLE.get(group)
    name = options.get("family", "swin") if group == "backbone" else options.get("name")
    return REGISTRIES[group].options(str(name))


def structured(config: dict[str, Any]) -> DictConfig:
    """Return a plain configuration as Hydra would have composed it, with the options that are younger than it.

    Raises:
        UserError: no component has such a name, or options are unknown or of another type.
    """
    names = {one.name for one in dataclasses.fields(RunConfig)}
    parts: dict[str, Any] = {}
    for name, value in with_older_options(config).items():
        if name not in names:
            continue  # of the command that made it
        if isinstance(value, dict):
            kind = kind_of(name, value)
            if kind is None:
                raise UserError(f"{name}.name={value.get('name')}: no such {name}")
            try:
                value = OmegaConf.merge(OmegaConf.structured(kind), value)
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                raise UserError(f"{name}: {first_line(error)}") from None
        parts[name] = value
    cfg = OmegaConf.structured(RunConfig)
    for name, value in parts.items():
        cfg[name] = value
    return cast(DictConfig, cfg)


def from_dict(config: dict[str, Any]) -> RunConfig:
    """Return a plain configuration, such as of a checkpoint, as a dataclass; as `structured`."""
    return typed(structured(config), RunConfig, complete=False)


class LegacyWarning(UserWarning):
    """Weights are used as they were trained, which differs from how new ones are."""


def _older(config: dict[str, Any]) -> Iterator[tuple[str, Any, Field[Any]]]:
    yield from older_options(RunConfig, config)
    for group in (one.name for one in dataclasses.fields(RunConfig)):
        options = config.get(group)
        kind = kind_of(group, options) if isinstance(options, dict) else None
        if kind is not None:
            yield from older_options(kind, cast("dict[str, Any]", options), f"{group}.")


def missing_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a plain configuration is older than, by dotted key, with what they were before."""
    return {key: value for key, value, _ in _older(config)}


def renamed_options(command: str) -> dict[str, str]:
    """Return the current names of the options of a command that have been renamed, by old name, both dotted."""
    options = declared_options(COMMANDS[command])
    return {
        f"{key.removesuffix(one.name)}{info_of(one).former_name}": key
        for key, one, _ in options
        if info_of(one).former_name
    }


def in_current_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration, such as of a run made by an older version, under current option names."""
    return with_current_names(RunConfig, {group: _part_in_current_names(group, one) for group, one in config.items()})


def metadata_in_current_names(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a checkpoint or an exported adapter under current option names."""
    parts: dict[str, Any] = {
        part: _part_in_current_names(part, metadata[part]) for part in ("adapter", "head") if part in metadata
    }
    config = metadata.get("config")
    return {**metadata, **parts, **({"config": in_current_names(config)} if isinstance(config, dict) else {})}


def _part_in_current_names(group: str, options: Any) -> Any:
    kind = kind_of(group, options) if isinstance(options, dict) else None
    return options if kind is None else with_current_names(kind, options)


def with_older_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration under current names, with newer options at the values they had before."""
    config = in_current_names(config)
    filled = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(config)))
    for key, value in missing_options(config).items():
        *path, name = key.split(".")
        part = filled
        for step in path:
            part = part[step]
        part[name] = value
    return filled


OF_TRAINING = re.compile(r"(optimizer|schedule)\.")


def warn_of_legacy_options(place: object, config: dict[str, Any]) -> None:
    """Warn where weights from `place` are older than options, with the values that they are used with."""
    missing = {
        key: value
        for key, value, one in _older(config)
        if value != one.default and not info_of(one).training_only and not OF_TRAINING.match(key)
    }
    if missing:
        listed = truncate_list([f"{key}={str(value).lower()}" for key, value in missing.items()], LISTED)
        warnings.warn(f"{place}: made by an older e3va; used as it was trained, with {listed}", LegacyWarning, 2)
