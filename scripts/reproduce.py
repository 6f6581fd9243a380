"""Reproduce an experiment of the paper over methods and seeds, and compare the results with the published ones.

    python scripts/reproduce.py voc_retinanet_swin_l --root data/voc/VOCdevkit
    python scripts/reproduce.py coco_cascade_swin_b --root data/coco --methods e3va,lora --seeds 0 data.batch_size=1

Runs are written to OUTPUT/METHOD/seed_SEED, results of all finished runs to OUTPUT/results.json and results.md. Stop it
and run it again at any time: finished runs are skipped, interrupted ones resumed. Exit code 1 if a run failed or its
files cannot be read, 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduction_tables import PARAMS, PEAK, STEP, Results, console, report

from e3va_cli.config.composition import load_config, parse, validate_overrides
from e3va_cli.config.overrides import to_override_value
from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError, first_line, print_errors
from e3va_cli.paper.published import ACCURACY, COCO, EXPERIMENTS, VOC
from e3va_cli.runs.folder import CHECKPOINTS, LAST_CHECKPOINT, METRICS, RESOURCES, read_overrides
from e3va_cli.utils.files import write_json

FINISHED = "finished.json"  # written when a run has finished training and exited with 0
REMEDY = "the run is excluded; remove this file to ignore its values, or the run's folder to repeat it"
GRACE = 10.0  # seconds until a run is killed after Ctrl-C
METRIC_NAMES = {"coco": ("box_AP", "mask_AP"), "voc": ("box_AP50",), "ade20k": ("mIoU",)}  # by dataset.name
PUBLISHED = {COCO.experiment: COCO, VOC.experiment: VOC, "ade20k_upernet_swin_l": VOC}  # ADE20K: VOC's parameters only
MOVABLE = ("dataset.root", "hydra.run.dir", "resume")  # data and run folders may move
RESERVED = (*MOVABLE, "experiment", "adapter", "seed")
# Options that do not change the setting: device, logging, and how the total batch, reported separately, is split.
PLACE = ("accelerator", "devices", "num_nodes", "strategy", "deterministic", "accumulate_grad_batches")
GUARD = ("checkpoint_every_steps", "preemption_signal", "max_nonfinite_steps", "skip_oom")
WATCH = ("val_every_epochs", "log_every_n_steps", "tensorboard", *GUARD)
FREE = {"data", "pictures", "budget", "backbone.weights", *(f"trainer.{key}" for key in (*PLACE, *WATCH))}


@dataclass(frozen=True)
class Run:
    """A run of `e3va train`."""

    method: str
    seed: int
    folder: Path
    overrides: list[str]

    @property
    def name(self) -> str:
        """Return the printed name."""
        return f"{self.method}, seed {self.seed}"

    @property
    def state(self) -> str:
        """Return `finished`, `interrupted` or `new`."""
        if (self.folder / FINISHED).is_file():
            return "finished"
        return "interrupted" if (self.folder / CHECKPOINTS / LAST_CHECKPOINT).is_file() else "new"

    @property
    def command(self) -> list[str]:
        """Return the command that starts or resumes it."""
        resume = [f"resume={to_override_value(str(self.folder))}"] if self.state == "interrupted" else []
        return [sys.executable, "-m", "e3va_cli", "train", *resume, *self.overrides]


@dataclass(frozen=True)
class Reproduction:
    """Methods and seeds of an experiment; `overrides` apply to every run."""

    experiment: str
    root: Path
    methods: list[str]
    seeds: list[int]
    output: Path
    overrides: list[str]

    def run(self, method: str, seed: int) -> Run:
        """Return the run of a method with a seed, with pre-trained weights unless overridden."""
        keys = {override.key_or_group for override in parse(self.overrides)}
        default = [] if keys & {"backbone.pretrained", "backbone.weights"} else ["backbone.pretrained=true"]
        folder = self.output / method / f"seed_{seed}"
        overrides = [f"experiment={self.experiment}", f"adapter={method}", f"seed={seed}"]
        overrides += [f"dataset.root={to_override_value(str(self.root))}", *default, *self.overrides]
        return Run(method, seed, folder, [*overrides, f"hydra.run.dir={to_override_value(str(folder))}"])

    @property
    def runs(self) -> list[Run]:
        """Return the runs of all methods and seeds."""
        return [self.run(method, seed) for method in self.methods for seed in self.seeds]

    @property
    def finished(self) -> list[Run]:
        """Return all finished runs in the output folder."""
        folders = [path.parent for path in self.output.glob(f"*/seed_*/{FINISHED}")]
        named = [(f.parent.name, int(f.name[5:])) for f in folders if re.fullmatch(r"seed_[0-9]+", f.name)]
        return [self.run(method, seed) for method, seed in sorted(named)]


# Before the runs


def parse_args(args: argparse.Namespace) -> Reproduction:
    """Return the runs of the command line, with validated overrides.

    Raises:
        UserError: one line per error.
    """
    if args.experiment not in EXPERIMENTS:
        raise UserError(
            f"{args.experiment}: no such experiment of the paper; choices: {', '.join(sorted(EXPERIMENTS))}"
        )
    methods, seeds = (list(dict.fromkeys(text.split(","))) for text in (args.methods, args.seeds))
    if not all(re.fullmatch(r"[0-9]{1,9}", seed) for seed in seeds):
        raise UserError(f"--seeds {args.seeds}: expected integers, such as 0,1,2")
    for override in parse(args.overrides):
        if override.key_or_group in RESERVED:
            raise UserError(f"{override.input_line}: set by this script; remove it")
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value at a time; use another --output for each")
    output = args.output or Path("runs") / "reproduce" / args.experiment
    root, output = (path.expanduser().resolve() for path in (args.root, output))
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; download the data with scripts/download.py")
    plan = Reproduction(args.experiment, root, methods, list(dict.fromkeys(map(int, seeds))), output, args.overrides)
    if args.gather_only and not plan.finished:
        raise UserError(f"--output {output}: no finished run; remove --gather-only or use another folder")
    errors: list[str] = []
    for method in methods:
        try:
            validate_overrides("train", plan.run(method, plan.seeds[0]).overrides)
        except UserError as error:
            errors += error.messages
    if errors:
        raise UserError(*dict.fromkeys(errors))
    for run in [*plan.finished, *(run for run in plan.runs if run.state == "interrupted")]:
        check_same_options(run)
    return plan


def check_same_options(run: Run) -> None:
    """Check that a run in the folder has the same options.

    Raises:
        UserError: it has other options.
    """
    before, now = (
        {o.key_or_group: str(o.input_line) for o in parse(overrides) if o.key_or_group not in MOVABLE}
        for overrides in (read_overrides(run.folder), run.overrides)
    )
    if before != now:
        old, new = (
            " ".join(text for key, text in one.items() if other.get(key) != text) or "nothing"
            for one, other in ((before, now), (now, before))
        )
        raise UserError(
            f"{run.folder}: was run with {old}, not with {new}; use the same overrides, or another --output"
        )


# The runs


def start(command: Sequence[str]) -> int:
    """Run a command and return its exit code, negative if a signal ended it."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # a terminal interrupts the run too; else terminate it
            for signal_run in (lambda: None, process.terminate):
                signal_run()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            raise
        finally:
            process.kill()  # no effect if it has ended


def run_all(plan: Reproduction, starter: Callable[[Sequence[str]], int], *, dry: bool) -> list[str]:
    """Start or resume every run that is not finished; return a message for each failure."""
    failed = []
    for number, run in enumerate(plan.runs, start=1):
        state = {"finished": "finished", "interrupted": "resuming", "new": "starting"}[run.state]
        console.print(f"Run {number} of {len(plan.runs)}: {run.name}: {state}")
        if run.state == "finished":
            continue
        console.print(f"  {shlex.join(run.command)}")
        if dry:
            continue
        if run.state == "new":  # of an earlier run; its presence marks the end of training
            (run.folder / RESOURCES).unlink(missing_ok=True)
        command = run.command
        code = starter(command)
        # A run that has finished an epoch writes its resources.
        if code == 0 and (run.folder / RESOURCES).is_file():
            write_json(run.folder / FINISHED, {"command": f"e3va {shlex.join(command[3:])}", "date": today()})
        else:
            failed.append(f"{run.name}: ended with exit code {code} before training finished")
            console.print(failed[-1])
    return failed


def today() -> str:
    """Return the date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


# Results


def read(path: Path) -> Results:
    """Return a JSON file of a run, empty if there is none.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, not {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {REMEDY}") from None
    return content


def read_number(path: Path, *keys: str) -> float | None:
    """Return the number under these keys of a JSON file, None if there is none."""
    value: Any = read(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {'.'.join(keys)} is {value!r}, not a number; {REMEDY}")
    return float(value)


def outcome(run: Run, metrics: Sequence[str]) -> Results:
    """Return metrics (in percent), resources, device and versions of a finished run."""
    scores = {name: read_number(run.folder / METRICS, *name.split("_")) for name in metrics}
    resources = read(run.folder / RESOURCES)
    return {
        **{name: None if value is None else 100 * value for name, value in scores.items()},
        **{name: read_number(run.folder / RESOURCES, name) for name in (PARAMS, PEAK, STEP)},
        **{key: resources.get(key) for key in ("device_name", "devices", "versions")},
    }


def over_seeds(outcomes: dict[int, Results], name: str) -> Results:
    """Return mean, sample standard deviation and values of all seeds; None without enough runs."""
    values = [run[name] for run in outcomes.values() if run[name] is not None]
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "by_seed": {str(seed): run[name] for seed, run in outcomes.items()},
    }


def published(experiment: str, method: str, metrics: Sequence[str]) -> Results:
    """Return the published values of a method, None where there are none."""
    accuracy, cost = ACCURACY.get(experiment, {}), PUBLISHED.get(experiment)
    values: Results = {name: accuracy.get(name, {}).get(method) for name in metrics}
    values |= {PARAMS: None, f"{PEAK}_saved_pct": None}
    if cost is not None and method in cost.methods:
        values[PARAMS] = round(1e6 * cost.methods[method][0])
        if cost.experiment == experiment and method != "full":
            values[f"{PEAK}_saved_pct"] = cost.saved_pct(method)
    return values


def add_savings(entries: list[Results], full: Results | None) -> None:
    """Add what each method saves of the memory and time of `full` in percent, None if either is unknown."""
    for e in entries:
        for name in (PEAK, STEP):
            ours, theirs = e[name]["mean"], full[name]["mean"] if full else None
            known = e is not full and ours is not None and theirs
            e[f"{name}_saved_pct"] = 100 * (1 - ours / theirs) if known else None


def gather(plan: Reproduction) -> Results:
    """Return the content of `results.json`: all finished runs in the output folder."""
    config = load_config("train", plan.runs[0].overrides)
    metrics = METRIC_NAMES[config.dataset.name]
    outcomes: dict[str, dict[int, Results]] = {method: {} for method in plan.methods}
    unreadable = []
    for run in plan.finished:
        try:
            outcomes.setdefault(run.method, {})[run.seed] = outcome(run, metrics)
        except UserError as error:
            unreadable.append(str(error))
    ran = [run for by_seed in outcomes.values() for run in by_seed.values() if run["devices"]]
    devices = sorted({f"{run['devices']} x {run['device_name']}" for run in ran})
    entries = [
        {
            "method": method,
            "seeds": list(by_seed),
            **{name: over_seeds(by_seed, name) for name in (*metrics, PARAMS, PEAK, STEP)},
            "published": published(plan.experiment, method, metrics),
        }
        for method, by_seed in outcomes.items()
    ]
    add_savings(entries, next((e for e in entries if e["method"] == "full" and len(devices) == 1), None))
    batch = config.data.batch_size * config.trainer.accumulate_grad_batches
    return {
        "experiment": plan.experiment,
        "date": today(),
        "overrides": plan.overrides,
        "not_the_papers": changed_settings(plan.overrides),
        "total_batch": sorted({batch * run["devices"] for run in ran}),
        "devices": devices,
        "versions": [dict(v) for v in sorted({tuple((run["versions"] or {}).items()) for run in ran})],
        "metrics": list(metrics),
        "methods": entries,
        "not_finished": [run.name for run in plan.runs if run.state != "finished"],
        "unreadable": unreadable,
        "settings": {key: value for key, value in to_dict(config).items() if key not in ("adapter", "seed")},
    }


def changed_settings(overrides: list[str]) -> list[str]:
    """Return the overrides that change the paper's setting."""
    return [
        str(override.input_line)
        for override in parse(overrides)
        if not FREE & {override.key_or_group, override.key_or_group.split(".")[0]}
        and (override.key_or_group, override.value()) != ("backbone.pretrained", True)
    ]


# The command


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Train methods and seeds in a setting of the paper, and compare with the published results.",
        epilog="Run it again at any time to resume.",
    )
    parser.add_argument("experiment", help="of conf/experiment")
    parser.add_argument("--root", type=Path, required=True, help="dataset.root")
    parser.add_argument("--methods", default="e3va,full", help="of conf/adapter (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of runs and results (default: runs/reproduce/EXPERIMENT)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    mode.add_argument("--gather-only", action="store_true", help="only collect the results of finished runs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of e3va train, for every run")
    return parser


def main(arguments: Sequence[str] | None = None, starter: Callable[[Sequence[str]], int] = start) -> int:
    """Run the command and return its exit code."""
    args = parser().parse_intermixed_args(arguments)
    try:
        plan = parse_args(args)
        failed = [] if args.gather_only else run_all(plan, starter, dry=args.dry_run)
        if args.dry_run:
            return 0
        report(results := gather(plan), plan.output)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except UserError as error:
        print_errors(error, "reproduce.py")
        return 2
    except OSError as error:
        print_errors(UserError(f"{first_line(error)}; fix this, then run again"), "reproduce.py")
        return 2
    for message in (errors := [*failed, *results["unreadable"]]):
        print(f"reproduce.py: {message}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end its runs too
    sys.exit(main())
