"""Reproduce one of the paper's experiments over methods and seeds, and set the results beside the published ones.

    python scripts/reproduce.py voc_retinanet_swin_l --root data/voc/VOCdevkit
    python scripts/reproduce.py coco_cascade_swin_b --root data/coco --methods e3va,lora --seeds 0 data.batch_size=1

Each run lies in OUTPUT/METHOD/seed_SEED; results of all finished runs there go to OUTPUT/results.json and results.md.
Stop it and run it again at any time: what is finished is left alone, and what was interrupted goes on.
Exit code 1 where a run failed or left files that cannot be read, 2 where something is wrong with the words given.
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
from importlib import resources
from pathlib import Path
from typing import Any

from reproduction_tables import PARAMS, PEAK, STEP, Results, console, report

from e3va_cli.config.composition import CONFIG_MODULE, load_config, parse, validate_overrides
from e3va_cli.config.overrides import as_value
from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError, first_line, print_mistakes
from e3va_cli.paper.published import ACCURACY, COCO, VOC
from e3va_cli.runs.folder import CHECKPOINTS, LAST, METRICS, RESOURCES, overrides_of
from e3va_cli.utils.files import write_json

FINISHED = "finished.json"  # written here once a run has trained to its end and exited with 0
REMEDY = "the run is left out; remove this file to do without its figures, or the run's folder to repeat it"
GRACE = 10.0  # seconds that a run has to end by itself after Ctrl-C
METRICS_OF = {"coco": ("box_AP", "mask_AP"), "voc": ("box_AP50",), "ade20k": ("mIoU",)}  # by dataset.name
PUBLISHED = {COCO.experiment: COCO, VOC.experiment: VOC, "ade20k_upernet_swin_l": VOC}  # of VOC's, only the parameters
MOVABLE = ("dataset.root", "hydra.run.dir", "resume")  # a run goes on where its data or its folder has moved to
RESERVED = (*MOVABLE, "experiment", "adapter", "seed")
# What leaves a setting what it is: where and how it runs, and how the total batch, which has its own line, is made up.
PLACE = ("accelerator", "devices", "num_nodes", "strategy", "deterministic", "accumulate_grad_batches")
GUARD = ("checkpoint_every_steps", "preemption_signal", "max_nonfinite_steps", "skip_oom")
WATCH = ("val_every_epochs", "log_every_n_steps", "tensorboard", *GUARD)
FREE = {"data", "num_visualizations", "budget", "backbone.weights", *(f"trainer.{key}" for key in (*PLACE, *WATCH))}


@dataclass(frozen=True)
class Run:
    """A run of `e3va train`, and the words that start it."""

    method: str
    seed: int
    folder: Path
    words: list[str]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method}, seed {self.seed}"

    @property
    def state(self) -> str:
        """`finished`, `interrupted` or `new`."""
        if (self.folder / FINISHED).is_file():
            return "finished"
        return "interrupted" if (self.folder / CHECKPOINTS / LAST).is_file() else "new"

    @property
    def command(self) -> list[str]:
        """What starts it or goes on with it."""
        resume = [f"resume={as_value(str(self.folder))}"] if self.state == "interrupted" else []
        return [sys.executable, "-m", "e3va_cli", "train", *resume, *self.words]


@dataclass(frozen=True)
class Plan:
    """What was asked for; `overrides` are those of every run."""

    experiment: str
    root: Path
    methods: list[str]
    seeds: list[int]
    output: Path
    overrides: list[str]

    def run(self, method: str, seed: int) -> Run:
        """The run of a method with a seed; on published weights, unless an override says otherwise."""
        chosen = {override.key_or_group for override in parse(self.overrides)}
        default = [] if chosen & {"backbone.pretrained", "backbone.weights"} else ["backbone.pretrained=true"]
        folder = self.output / method / f"seed_{seed}"
        words = [f"experiment={self.experiment}", f"adapter={method}", f"seed={seed}"]
        words += [f"dataset.root={as_value(str(self.root))}", *default, *self.overrides]
        return Run(method, seed, folder, [*words, f"hydra.run.dir={as_value(str(folder))}"])

    @property
    def runs(self) -> list[Run]:
        """Those asked for."""
        return [self.run(method, seed) for method in self.methods for seed in self.seeds]

    @property
    def finished(self) -> list[Run]:
        """Those in the output folder that are finished, whichever call of this script asked for them."""
        folders = [path.parent for path in self.output.glob(f"*/seed_*/{FINISHED}")]
        named = [(f.parent.name, int(f.name[5:])) for f in folders if re.fullmatch(r"seed_[0-9]+", f.name)]
        return [self.run(method, seed) for method, seed in sorted(named)]


# Before the runs


def read_plan(given: argparse.Namespace) -> Plan:
    """The plan, once every run of it is known to have words that `e3va train` takes.

    Raises:
        UserError: one line for each mistake.
    """
    files = resources.files(CONFIG_MODULE).joinpath("experiment").iterdir()
    experiments = sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
    if given.experiment not in experiments:  # Hydra would leave it out without a word
        raise UserError(f"{given.experiment}: no such experiment; choices: {', '.join(experiments)}")
    methods, seeds = (list(dict.fromkeys(words.split(","))) for words in (given.methods, given.seeds))
    if not all(re.fullmatch(r"[0-9]{1,9}", seed) for seed in seeds):
        raise UserError(f"--seeds {given.seeds}: whole numbers with commas between them, such as 0,1,2")
    for override in parse(given.overrides):
        if override.key_or_group in RESERVED:
            raise UserError(f"{override.input_line}: set by this script's own options; leave it out")
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value at a time; take another --output for each")
    output = given.output or Path("runs") / "reproduce" / given.experiment
    root, output = (path.expanduser().resolve() for path in (given.root, output))
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; scripts/download.py makes one")
    plan = Plan(given.experiment, root, methods, list(dict.fromkeys(map(int, seeds))), output, given.overrides)
    if given.gather_only and not plan.finished:
        raise UserError(f"--output {output}: holds no finished run; leave out --gather-only, or give another folder")
    mistakes: list[str] = []
    for method in methods:
        try:
            validate_overrides("train", plan.run(method, plan.seeds[0]).words)
        except UserError as error:
            mistakes += error.messages
    if mistakes:
        raise UserError(*dict.fromkeys(mistakes))
    for run in [*plan.finished, *(run for run in plan.runs if run.state == "interrupted")]:
        require_same(run)
    return plan


def require_same(run: Run) -> None:
    """Refuse to mix runs under different options in one folder."""
    there, here = (
        {o.key_or_group: str(o.input_line) for o in parse(words) if o.key_or_group not in MOVABLE}
        for words in (overrides_of(run.folder), run.words)
    )
    if there != here:
        theirs, ours = (
            " ".join(word for key, word in one.items() if other.get(key) != word) or "nothing"
            for one, other in ((there, here), (here, there))
        )
        raise UserError(
            f"{run.folder}: was run with {theirs} where there is {ours} now; give the same words, or another --output"
        )


# The runs


def start(command: Sequence[str]) -> int:
    """Run a command with its output passed through; returns its exit code, below 0 where a signal ended it."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # a terminal tells the run too; one that was not told is asked to end
            for ask in (lambda: None, process.terminate):
                ask()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            raise
        finally:
            process.kill()  # does nothing to one that has ended


def run_all(plan: Plan, starter: Callable[[Sequence[str]], int], *, dry: bool) -> list[str]:
    """Start or go on with every run that is not finished; returns what is to be said of those that failed."""
    failed = []
    for number, run in enumerate(plan.runs, start=1):
        what = {"finished": "is finished", "interrupted": "goes on", "new": "starts"}[run.state]
        console.print(f"Run {number} of {len(plan.runs)}: {run.name}: {what}")
        if run.state == "finished":
            continue
        console.print(f"  {shlex.join(run.command)}")
        if dry:
            continue
        if run.state == "new":  # what would tell that it has trained must be its own
            (run.folder / RESOURCES).unlink(missing_ok=True)
        command = run.command
        code = starter(command)
        # Resources are left by a run that has trained to the end of an epoch, at least.
        if code == 0 and (run.folder / RESOURCES).is_file():
            write_json(run.folder / FINISHED, {"command": f"e3va {shlex.join(command[3:])}", "date": today()})
        else:
            failed.append(f"{run.name}: ended with exit code {code} before it was finished")
            console.print(failed[-1])
    return failed


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


# What they left


def read(path: Path) -> Results:
    """A JSON file of a run, empty where there is none.

    Raises:
        UserError: broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not figures by name")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {REMEDY}") from None
    return content


def figure(path: Path, *keys: str) -> float | None:
    """The number under these keys of a file of a run, None where there is none."""
    value: Any = read(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {'.'.join(keys)} is {value!r}, no number; {REMEDY}")
    return float(value)


def outcome(run: Run, metrics: Sequence[str]) -> Results:
    """The figures of a finished run by name, metrics in percent, and what `resources.json` says of where it ran."""
    scores = {name: figure(run.folder / METRICS, *name.split("_")) for name in metrics}
    place = read(run.folder / RESOURCES)
    return {
        **{name: None if value is None else 100 * value for name, value in scores.items()},
        **{name: figure(run.folder / RESOURCES, name) for name in (PARAMS, PEAK, STEP)},
        **{key: place.get(key) for key in ("device_name", "devices", "versions")},
    }


def over_seeds(outcomes: dict[int, Results], name: str) -> Results:
    """Mean and sample standard deviation of a figure; None where no run, or fewer than two, have it."""
    values = [found[name] for found in outcomes.values() if found[name] is not None]
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "by_seed": {str(seed): found[name] for seed, found in outcomes.items()},
    }


def published(experiment: str, method: str, metrics: Sequence[str]) -> Results:
    """What the paper's tables have for a method; None where they have nothing."""
    accuracy, cost = ACCURACY.get(experiment, {}), PUBLISHED.get(experiment)
    found: Results = {name: accuracy.get(name, {}).get(method) for name in metrics}
    found |= {PARAMS: None, f"{PEAK}_saved_pct": None}
    if cost is not None and method in cost.methods:
        found[PARAMS] = round(1e6 * cost.methods[method][0])
        if cost.experiment == experiment and method != "full":
            found[f"{PEAK}_saved_pct"] = cost.saved_pct(method)
    return found


def add_savings(entries: list[Results], full: Results | None) -> None:
    """What each method saves of the memory and time of `full`, in percent; None without a figure of both."""
    for e in entries:
        for name in (PEAK, STEP):
            ours, theirs = e[name]["mean"], full[name]["mean"] if full else None
            known = e is not full and ours is not None and theirs
            e[f"{name}_saved_pct"] = 100 * (1 - ours / theirs) if known else None


def gather(plan: Plan) -> Results:
    """The content of `results.json`: every finished run in the output folder."""
    config = load_config("train", plan.runs[0].words)
    metrics = METRICS_OF[config.dataset.name]
    outcomes: dict[str, dict[int, Results]] = {method: {} for method in plan.methods}
    unreadable = []
    for run in plan.finished:
        try:
            outcomes.setdefault(run.method, {})[run.seed] = outcome(run, metrics)
        except UserError as error:
            unreadable.append(str(error))
    ran = [found for by_seed in outcomes.values() for found in by_seed.values() if found["devices"]]
    devices = sorted({f"{found['devices']} x {found['device_name']}" for found in ran})
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
        "not_the_papers": changes(plan.overrides),
        "total_batch": sorted({batch * found["devices"] for found in ran}),
        "devices": devices,
        "versions": [dict(v) for v in sorted({tuple((found["versions"] or {}).items()) for found in ran})],
        "metrics": list(metrics),
        "methods": entries,
        "not_finished": [run.name for run in plan.runs if run.state != "finished"],
        "unreadable": unreadable,
        "settings": {key: value for key, value in to_dict(config).items() if key not in ("adapter", "seed")},
    }


def changes(overrides: list[str]) -> list[str]:
    """The overrides that make an experiment another one."""
    return [
        str(override.input_line)
        for override in parse(overrides)
        if not FREE & {override.key_or_group, override.key_or_group.split(".")[0]}
        and (override.key_or_group, override.value()) != ("backbone.pretrained", True)
    ]


# The command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Train each method with each seed in a published setting, and compare with the published results.",
        epilog="Run it again at any time: it goes on where it stopped.",
    )
    made.add_argument("experiment", help="a name in conf/experiment")
    made.add_argument("--root", type=Path, required=True, help="the data, as dataset.root wants it")
    made.add_argument("--methods", default="e3va,full", help="names in conf/adapter (%(default)s)")
    made.add_argument("--seeds", default="0,1,2", help="(%(default)s)")
    made.add_argument("--output", type=Path, help="folder of the runs and results (runs/reproduce/EXPERIMENT)")
    less = made.add_mutually_exclusive_group()
    less.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    less.add_argument("--gather-only", action="store_true", help="run nothing; gather the results of finished runs")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of e3va train, for every run")
    return made


def main(words: Sequence[str] | None = None, starter: Callable[[Sequence[str]], int] = start) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_intermixed_args(words)
    try:
        plan = read_plan(given)
        failed = [] if given.gather_only else run_all(plan, starter, dry=given.dry_run)
        if given.dry_run:
            return 0
        report(results := gather(plan), plan.output)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again, and it goes on where it stopped", file=sys.stderr)
        return 130
    except UserError as error:
        print_mistakes(error, "reproduce.py")
        return 2
    except OSError as error:
        print_mistakes(UserError(f"{first_line(error)}; mend this, then run again"), "reproduce.py")
        return 2
    for fault in (faults := [*failed, *results["unreadable"]]):
        print(f"reproduce.py: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run outlives this script
    sys.exit(main())
