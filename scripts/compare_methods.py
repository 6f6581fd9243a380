"""Compare the accuracy of tuning methods on one experiment, each at its best learning rates.

    python scripts/compare_methods.py camvid_upernet_swin_nano dataset.root=data/camvid
    python scripts/compare_methods.py bccd_retinanet_swin_nano --methods e3va,lora --seeds 0,1 dataset.root=data/bccd

1. Learning rates: each method runs with all `--lrs`, and with all `--adapter-lr-scales` if it trains more than neck,
   head and output norms, for a third of the steps. A fifth of the training images is held back and decides.
2. Accuracy: each method runs with its best rates and each seed, and is evaluated on the validation images.
3. Cost: the memory of a step on a GPU is estimated; the time of a step is measured here, one method after another. With
   `--equal-time`, methods whose step takes longer than E3VA's also run for as many steps as take E3VA's time.

Methods that leave the backbone unchanged train together, on one pass of it. Finished runs in OUTPUT/EXPERIMENT are not
repeated; stop the script and run it again at any time. comparison.md and comparison.png in OUTPUT have the results of
all experiments there. Exit code 1 if a run failed, 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
from comparison_report import write_report
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from e3va_cli.commands.benchmark_memory import load_method_config, validate_methods
from e3va_cli.config.composition import CONFIG_MODULE, load_config, parse, validate_overrides
from e3va_cli.config.run_config import TrainConfig
from e3va_cli.data import build_datasets
from e3va_cli.errors import UserError, first_line, print_errors
from e3va_cli.memory.benchmark import benchmark_spec, run_benchmark
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.heads import HEADS
from e3va_cli.training.run import TrainingRun, train_schedule_from_config
from e3va_cli.training.shared_pass import train_together
from e3va_cli.utils.environment import device_name, package_versions
from e3va_cli.utils.files import write_json
from e3va_cli.utils.terminal import Throttle

OUTPUT = Path("runs") / "comparison"
FINISHED, RESULTS, COSTS, OVERRIDES = "finished.json", "comparison.json", "costs.json", "overrides.json"
BASELINE, REFERENCE = "full", "e3va"  # of step times; whose time the others get with --equal-time
SEARCH_PART, HELD_BACK = 3, 0.2
AT_ONCE = 8  # runs on one pass of the backbone
RESERVED = (
    "adapter",
    "experiment",
    "seed",
    "resume",
    "init_from",
    "hydra.run.dir",
    "trainer.max_steps",
    "dataset.val_fraction",
)
console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Member:
    """A run.

    Attributes:
        phase: search, of learning rates; steps or time, at equal steps or time.
        scale: `optimizer.adapter_lr_scale`.
    """

    phase: str
    method: str
    seed: int
    lr: float
    scale: float
    max_steps: int

    @property
    def name(self) -> str:
        """Return the name of the run folder."""
        return f"{self.phase}/{self.method}_lr{self.lr:g}_x{self.scale:g}_seed{self.seed}_{self.max_steps}"


@dataclass(frozen=True)
class Comparison:
    """Methods on an experiment; see the command-line options."""

    experiment: str
    overrides: list[str]
    methods: list[str]
    seeds: list[int]
    lrs: list[float]
    scales: list[float]
    folder: Path
    equal_time: bool

    def config(self, member: Member) -> TrainConfig:
        """Return the configuration of a run, which is evaluated at its end only."""
        options = [f"adapter={member.method}", f"seed={member.seed}", f"trainer.max_steps={member.max_steps}"]
        options += [f"optimizer.lr={member.lr}", f"optimizer.adapter_lr_scale={member.scale}"]
        options += [f"dataset.val_fraction={HELD_BACK}"] if member.phase == "search" else []
        config: TrainConfig = load_config("train", [f"experiment={self.experiment}", *self.overrides, *options])
        return replace(config, trainer=replace(config.trainer, val_every_epochs=sys.maxsize, tensorboard=False))

    def total_steps(self) -> int:
        """Return the optimizer steps of the experiment."""
        config: TrainConfig = load_config("train", [f"experiment={self.experiment}", *self.overrides])
        train, _ = build_datasets(config.dataset, targets=HEADS[config.head.name].target_types)
        assert train is not None
        batches = max(1, len(train) // config.data.batch_size)
        return train_schedule_from_config(config, batches_per_epoch=batches, devices=1).total_steps

    def candidates(self, steps: int) -> list[Member]:
        """Return the runs that choose the learning rates of all methods."""
        return [
            Member("search", method, self.seeds[0], lr, scale, max(1, steps // SEARCH_PART))
            for method in self.methods
            for lr, scale in product(self.lrs, [1.0] if method == "frozen" else self.scales)
        ]

    def costs(self) -> dict[str, dict[str, Any]]:
        """Estimate memory on a GPU and measure step times on this machine, for all methods and `BASELINE`."""
        file = self.folder / COSTS
        known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
        methods = list(dict.fromkeys([BASELINE, REFERENCE, *self.methods]))
        if known.keys() >= set(methods):
            return known
        overrides = [f"experiment={self.experiment}", "measure=true", *self.overrides]
        GlobalHydra.instance().clear()
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            configs = {method: load_method_config(overrides, method) for method in methods}
        spec = benchmark_spec(configs[BASELINE])
        estimates = run_benchmark(configs, replace(spec, device=None))
        for estimated, measured in zip(estimates, run_benchmark(configs, spec), strict=True):
            if measured.step_time_s is None:
                raise UserError(f"adapter={measured.method}: could not measure a step: {measured.details}")
            known[measured.method] = {
                "trainable_params": estimated.trainable_params,
                "estimated_peak_mib": estimated.peak_mib,
                "step_time_s": measured.step_time_s,
            }
            console.print(f"{measured.method}: {estimated.peak_mib:,.0f} MiB, {measured.step_time_s:.2f} s a step")
        write_json(file, known)
        return known

    def run(self) -> bool:
        """Run what is not finished and write the results; return whether nothing failed."""
        self.check_overrides()
        steps = self.total_steps()
        searched = self.train(self.candidates(steps))
        best: dict[str, Member] = {}
        for member, result in searched.items():
            if member.method not in best or result["value"] > searched[best[member.method]]["value"]:
                best[member.method] = member
        finals = [
            replace(member, phase="steps", seed=seed, max_steps=steps)
            for seed in self.seeds
            for member in best.values()
        ]
        trained = self.train(finals)
        costs = self.costs()
        if self.equal_time:
            step_s = {method: costs[method]["step_time_s"] for method in best}
            ratios = {method: costs[REFERENCE]["step_time_s"] / time for method, time in step_s.items()}
            shorter = [one for one in finals if ratios[one.method] < 1]
            shorter = [replace(m, phase="time", max_steps=max(1, round(steps * ratios[m.method]))) for m in shorter]
            trained |= self.train(shorter)
            finals += shorter
        results = {
            "experiment": self.experiment,
            "overrides": self.overrides,
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "versions": package_versions(),
            "date": f"{datetime.date.today()}",
            "steps": steps,
            "costs": costs,
            "search": [asdict(member) | result for member, result in searched.items()],
            "runs": [asdict(member) | result for member, result in trained.items()],
        }
        write_json(self.folder / RESULTS, results)
        return len(searched) + len(trained) == len(self.candidates(steps)) + len(finals)

    def check_overrides(self) -> None:
        """Write the overrides to the folder, whose finished runs are those of this setting.

        Raises:
            UserError: it has runs with other overrides; only `dataset.root` may change.
        """
        file = self.folder / OVERRIDES
        used = sorted(word for word in self.overrides if not word.startswith("dataset.root="))
        if file.is_file() and (before := json.loads(file.read_text())) != used:
            raise UserError(
                f"{self.folder} has runs with {' '.join(before) or 'no overrides'}; use another --output for "
                f"{' '.join(used) or 'no overrides'}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, used)

    def train(self, members: Sequence[Member]) -> dict[Member, dict[str, Any]]:
        """Train what is not finished; return the result of each finished run."""
        groups: dict[Any, list[Member]] = defaultdict(list)
        for member in members:
            if not (self.folder / member.name / FINISHED).is_file():
                alone = None if METHODS[member.method].shares_backbone else member
                groups[member.phase, member.seed, member.max_steps, alone].append(member)
        batches = [
            group[start : start + AT_ONCE] for group in groups.values() for start in range(0, len(group), AT_ONCE)
        ]
        for number, together in enumerate(batches, 1):
            names = ", ".join(member.name.partition("/")[2] for member in together)
            console.print(f"{together[0].phase}, {number} of {len(batches)}: {names}")
            self.train_group(together)
        files = {member: self.folder / member.name / FINISHED for member in members}
        return {member: json.loads(file.read_text()) for member, file in files.items() if file.is_file()}

    def train_group(self, members: Sequence[Member]) -> None:
        """Train runs on one pass of the backbone, and write the result of each to its folder."""
        folders = [self.folder / member.name for member in members]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        throttle = Throttle()

        def progress(_: int, trainer: L.Trainer) -> None:
            if throttle.ready():
                console.print(f"  step {trainer.global_step} of {members[0].max_steps}")

        outcomes = train_together([self.config(member) for member in members], folders, progress)
        for member, folder, outcome in zip(members, folders, outcomes, strict=True):
            if not isinstance(outcome, TrainingRun):
                console.print(f"  {member.name} failed: {first_line(outcome)}")
                continue
            evaluator, found = outcome.lightning_module.evaluator, outcome.lightning_module.results
            assert found is not None
            value = evaluator.log_dict(found)[evaluator.monitor]
            console.print(f"  {member.name}: {evaluator.monitor} {100 * value:.1f}")
            write_json(folder / FINISHED, {"metric": evaluator.monitor, "value": value, "results": found})


def parse_args(words: Sequence[str] | None) -> Comparison:
    """Return the comparison of the command line.

    Raises:
        UserError: one line for each error.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="in conf/experiment")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of e3va train for every run")
    parser.add_argument("--methods", default="full,frozen,lora,mona,colin,e3va,e3va_plus", help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--lrs", default="1e-3,3e-3", help="optimizer.lr to try; default: %(default)s")
    parser.add_argument("--adapter-lr-scales", default="0.1,1,5", help="to try; default: %(default)s")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--equal-time", action="store_true", help="also compare at E3VA's training time")
    args = parser.parse_intermixed_args(words)
    files = resources.files(CONFIG_MODULE).joinpath("experiment").iterdir()
    experiments = sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
    if args.experiment not in experiments:
        raise UserError(f"{args.experiment}: no such experiment; choices: {', '.join(experiments)}")
    methods = validate_methods(args.methods.split(","))
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        lrs, scales = ([float(value) for value in text.split(",")] for text in (args.lrs, args.adapter_lr_scales))
    except ValueError as error:
        raise UserError(
            f"--seeds, --lrs or --adapter-lr-scales: {first_line(error)}; separate numbers by commas"
        ) from None
    for override in parse(args.overrides):
        if override.key_or_group in RESERVED or override.is_sweep_override():
            raise UserError(f"{override.input_line}: set by this script, or several values; remove it")
    validate_overrides("train", [f"experiment={args.experiment}", *args.overrides])
    folder = args.output / args.experiment
    return Comparison(args.experiment, args.overrides, methods, seeds, lrs, scales, folder, args.equal_time)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        comparison = parse_args(words)
        complete = comparison.run()
        output = comparison.folder.parent
        write_report([json.loads(file.read_text()) for file in sorted(output.glob(f"*/{RESULTS}"))], output, console)
    except UserError as error:
        print_errors(error, "compare_methods.py")
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; run the same command to go on.")
        return 130
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
