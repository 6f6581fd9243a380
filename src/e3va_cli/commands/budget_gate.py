"""`e3va train budget=11GiB`: a run that cannot fit is refused before anything is loaded, with what would fit."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra import compose

from e3va_cli.commands.console import console
from e3va_cli.composition import plain
from e3va_cli.errors import UserError
from e3va_cli.machine import MIB
from e3va_cli.memory.benchmark import Setting, largest_batch_of, setting_of
from e3va_cli.memory.budget import parse_budget
from e3va_cli.memory.planner import plan


def require_fit(config: dict[str, Any], budget: str) -> None:
    """Plan the largest step of a run; numbers that a training run does not have are those of benchmark_memory.yaml.

    Raises:
        UserError: it needs more than `budget`; names what would fit.
    """
    setting = setting_of_run(config)
    reserve_mib = benchmark_options()["reserve_mib"]
    limit_mib = parse_budget(budget) - reserve_mib
    needed = peak_mib(config, setting)
    height, width = setting.size.image_size
    about = f"{needed:.0f} MiB at the largest image, {height}x{width}, and {reserve_mib:.0f} MiB of CUDA's own"
    if needed <= limit_mib:
        console.print(f"Within budget={budget}: planned {about}")
        return
    remedies = what_would_fit(config, setting, limit_mib)
    hint = "; this would fit: " + ", or ".join(remedies) if remedies else "; nothing smaller fits either"
    raise UserError(f"budget={budget}: this run cannot fit: it needs {about}{hint}")


def benchmark_options() -> dict[str, Any]:
    """What `e3va benchmark-memory` has by default."""
    return plain(compose("benchmark_memory"), complete=False)


def setting_of_run(config: dict[str, Any]) -> Setting:
    """The largest step of a run, on a GPU; numbers that a training run does not have are benchmark_memory.yaml's."""
    return setting_of({**benchmark_options(), **config, "measure": False, "budget": None})


def peak_mib(config: dict[str, Any], setting: Setting) -> float:
    """What the tensors of a step will need."""
    return plan(config, setting.size, num_classes=setting.num_classes).peak.total_bytes / MIB


def what_would_fit(config: dict[str, Any], setting: Setting, limit_mib: float) -> list[str]:
    """Overrides of which each alone makes the run fit."""
    remedies = []
    batch, accumulated = setting.size.batch_size, config["trainer"]["accumulate_grad_batches"]
    largest = largest_batch_of(config, setting, limit_mib)
    if largest:
        steps = -(-batch * accumulated // largest)
        remedies.append(f"data.batch_size={largest} trainer.accumulate_grad_batches={steps}")
    if setting.size.precision == "32":
        mixed = dataclasses.replace(setting, size=dataclasses.replace(setting.size, precision="bf16-mixed"))
        if peak_mib(config, mixed) <= limit_mib:
            remedies.append("trainer.precision=bf16-mixed")
    for activations in ("compress", "recompute"):
        adapter = {**config["adapter"], "activations": activations}
        other = config["adapter"].get("activations", activations) != activations
        if other and peak_mib({**config, "adapter": adapter}, setting) <= limit_mib:
            remedies.append(f"adapter.activations={activations}")
    ours = plain(compose("train", overrides=["adapter=e3va"]))["adapter"]
    if config["adapter"]["name"] != ours["name"] and peak_mib({**config, "adapter": ours}, setting) <= limit_mib:
        remedies.append("adapter=e3va")
    return remedies
