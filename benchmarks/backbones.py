"""Estimate the memory of every backbone: peaks of a step at several batch sizes, and the largest batches in budgets.

    python benchmarks/backbones.py [--backbones swin_t,swin_s,...] [--methods full,lora,e3va] [--batch-sizes 1,2]
                                   [--budgets 8GiB,11GiB,16GiB,24GiB] [--output FILE.json] [KEY=VALUE ...]

The step is that of Mask R-CNN on images of 800x1333 in bf16-mixed, unless overridden. `reserve_mib` of a budget is
left to CUDA. No GPU, weights or data are needed; one to four minutes a backbone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import common
from hydra import initialize_config_module

from e3va_cli.commands.benchmark_memory import COMMAND, load_method_config, validate_methods
from e3va_cli.config.composition import CONFIG_MODULE, groups, validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.memory.budget import max_batch_size, parse_budget
from e3va_cli.memory.estimate import MemoryEstimate
from e3va_cli.utils.environment import MIB

STEP = ("dataset=coco", "head=mask_rcnn", "trainer.precision=bf16-mixed", "measure=false")
FOR_TESTS = ("swin_nano",)
NOT_SUITED = "-"  # a method that a backbone cannot have, as LoRA without attention


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--backbones", help="of conf/backbone/; all by default")
    parser.add_argument("--methods", default="full,lora,e3va")
    parser.add_argument("--batch-sizes", type=lambda text: common.int_list(text, least=1), default=[1, 2])
    parser.add_argument("--budgets", default="8GiB,11GiB,16GiB,24GiB", help="'' for none")
    return parser


class Method:
    """A tuning method of a backbone, whose estimates are cached.

    Raises:
        UserError: an invalid override, or, in `estimate`, a method that does not suit the backbone.
    """

    def __init__(self, backbone: str, name: str, overrides: Sequence[str]) -> None:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            self.config = load_method_config([*STEP, f"backbone={backbone}", *overrides], name)
        self.spec = benchmark_spec(self.config)
        self.estimate = cache(self._estimate)

    def _estimate(self, batch_size: int) -> MemoryEstimate:
        size = dataclasses.replace(self.spec.size, batch_size=batch_size)
        return dataclasses.replace(self.spec, size=size).estimate(self.config)

    def peak_mib(self, batch_size: int) -> float:
        """Return the estimated peak of a step."""
        return self.estimate(batch_size).peak.total_bytes / MIB

    def largest_batch(self, budget: str) -> int:
        """Return the largest batch within a budget such as `11GiB`."""
        return max_batch_size(self.peak_mib, parse_budget(budget) - self.config.reserve_mib)


def values_of(
    backbone: str, name: str, overrides: Sequence[str], batch_sizes: Sequence[int], budgets: Sequence[str]
) -> dict[str, Any] | None:
    """Return parameters, peaks and largest batches of a method; None if it does not suit the backbone."""
    method = Method(backbone, name, overrides)
    try:
        parameters = method.estimate(batch_sizes[0]).parameters
    except UserError:
        return None
    return {
        "trainable": parameters["trainable_backbone_params"],
        "parameters": parameters["backbone_params"],
        "peak_mib": [round(method.peak_mib(size), 1) for size in batch_sizes],
        "largest_batch": [method.largest_batch(budget) for budget in budgets],
    }


def selected_backbones(text: str | None) -> list[str]:
    """Return the backbones of `--backbones`, by default all but those for tests.

    Raises:
        UserError: an unknown one.
    """
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        known = groups()["backbone"]
    selected = [name for name in known if name not in FOR_TESTS] if text is None else text.split(",")
    if unknown := [name for name in selected if name not in known]:
        raise UserError(f"--backbones {text}: no backbone {', '.join(unknown)}; choices: {', '.join(known)}")
    return selected


def cells(values: dict[str, dict[str, Any] | None], batch_sizes: Sequence[int], budgets: Sequence[str]) -> list[str]:
    """Return the cells of a backbone: parameters, trainable ones, peaks by method, largest batches by budget."""
    suited = [one for one in values.values() if one is not None]
    last = list(values.values())[-1]
    peaks = [
        f"{one['peak_mib'][index]:,.0f}" if one else NOT_SUITED
        for one in values.values()
        for index in range(len(batch_sizes))
    ]
    batches = [
        " / ".join(str(one["largest_batch"][index]) if one else NOT_SUITED for one in values.values())
        for index in range(len(budgets))
    ]
    trained = f"{last['trainable'] / 1e6:,.2f}" if last else NOT_SUITED
    return [f"{suited[0]['parameters'] / 1e6:,.1f}", trained, *peaks, *batches]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parser().parse_intermixed_args(arguments)
    methods, budgets = validate_methods(args.methods.split(",")), [b for b in args.budgets.split(",") if b]
    for budget in budgets:
        parse_budget(budget)
    validate_overrides(COMMAND, [*STEP, *args.overrides])
    backbones = selected_backbones(args.backbones)
    results, rows = {}, []
    for backbone in backbones:
        print(f"{backbone} ...", file=sys.stderr)
        values = {name: values_of(backbone, name, args.overrides, args.batch_sizes, budgets) for name in methods}
        results[backbone] = values
        rows.append([f"`{backbone}`", *cells(values, args.batch_sizes, budgets)])
    common.console.print(
        f"Estimated: {' '.join([*STEP[:-1], *args.overrides])}. METHOD N: peak in MiB at batch size N; on BUDGET: "
        f"largest batch size of {' / '.join(methods)}\n"
    )
    peaks = [f"{name} {size}" for name in methods for size in args.batch_sizes]
    columns = ["backbone", "params, M", f"{methods[-1]} trains, M", *peaks, *(f"on {budget}" for budget in budgets)]
    common.show(columns, sorted(rows, key=lambda row: (row[0].rpartition("_")[0], float(row[1].replace(",", "")))))
    common.write(args.output, "cpu", {"source": "estimated", "budgets": budgets, "backbones": results})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
