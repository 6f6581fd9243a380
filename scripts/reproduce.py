"""Reproduce one of the paper's experiments over several methods and seeds, and set the results beside the published ones.

    python scripts/reproduce.py voc_retinanet_swin_l --root data/voc/VOCdevkit
    python scripts/reproduce.py coco_cascade_swin_b --root data/coco --methods e3va,lora --seeds 0 data.batch_size=1
    python scripts/reproduce.py voc_retinanet_swin_l --root data/voc/VOCdevkit --dry-run

Each run lies in OUTPUT/METHOD/seed_SEED; the results of all finished runs there go to OUTPUT/results.json and results.md.
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
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from e3va_cli.composition import CONFIG_MODULE, checked, parse, plain
from e3va_cli.config import register_schemas
from e3va_cli.errors import UserError, first_line
from e3va_cli.files import replacing, write_json
from e3va_cli.memory.published import ACCURACY, COCO, VOC
from e3va_cli.run_folder import CHECKPOINTS, LAST, METRICS, METRICS_HISTORY, RESOURCES, overrides_of

FINISHED = "finished.json"  # written here once a run has ended with exit code 0
GRACE = 30.0  # seconds that a run has to end by itself after Ctrl-C
METRICS_OF = {"coco": ("box_AP", "mask_AP"), "voc": ("box_AP50",), "ade20k": ("mIoU",)}  # by dataset.name
# Published parameters; VOC's column is ADE20K's too. Memory is published for the first two only.
PUBLISHED = {COCO.experiment: COCO, VOC.experiment: VOC, "ade20k_upernet_swin_l": VOC}
FIGURES = {  # ours, and the key of resources.json
    "trainable_backbone_params": "trainable_backbone_params",
    "peak_memory_mib": "peak_memory_allocated_mib",
    "step_time_s": "step_time_s",
}
RESERVED = {
    **{"experiment": "EXPERIMENT", "dataset.root": "--root", "adapter": "--methods", "seed": "--seeds"},
    **{"hydra.run.dir": "--output", "resume": "what lies in --output"},
}
# Options that leave a setting what it is: where and how it runs, and how the total batch, which has its own line, is made.
FREE = {
    *("dataset.root", "pictures", "budget", "data.batch_size", "data.val_batch_size", "data.num_workers"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.deterministic"),
    *("trainer.accumulate_grad_batches", "trainer.val_every_epochs", "trainer.log_every_n_steps", "trainer.tensorboard"),
}
PER_RUN = ("adapter", "seed", "resume", "budget")
Results = dict[str, Any]

console = Console(highlight=False, markup=False, soft_wrap=True)


def quoted(path: Path) -> str:
    """A path as Hydra reads it, whatever characters it has."""
    return "'" + str(path).replace("'", r"\'") + "'"


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
        resume = [f"resume={quoted(self.folder)}"] if self.state == "interrupted" else []
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

    @property
    def runs(self) -> list[Run]:
        """One for each method and seed."""
        return [self.run(method, seed) for method in self.methods for seed in self.seeds]

    def run(self, method: str, seed: int) -> Run:
        """The run of a method with a seed."""
        chosen = {override.key_or_group for override in parse(self.overrides)}
        default = [] if chosen & {"backbone.pretrained", "backbone.weights"} else ["backbone.pretrained=true"]
        folder = self.output / method / f"seed_{seed}"
        words = [*self.setting(method), f"seed={seed}", *default, *self.overrides, f"hydra.run.dir={quoted(folder)}"]
        return Run(method, seed, folder, words)

    def setting(self, method: str) -> list[str]:
        """The words for the experiment as `conf/` has it."""
        return [f"experiment={self.experiment}", f"adapter={method}", f"dataset.root={quoted(self.root)}"]

    def finished(self) -> list[Run]:
        """All finished runs in the output folder, from this call and earlier ones."""
        folders = [path.parent for path in sorted(self.output.glob(f"*/seed_*/{FINISHED}"))]
        named = [(f.parent.name, int(f.name[5:])) for f in folders if re.fullmatch(r"seed_\d+", f.name)]
        return [self.run(method, seed) for method, seed in sorted(named)]


# Before the runs


def read_plan(arguments: argparse.Namespace) -> Plan:
    """The plan, once every run of it is known to have words that `e3va train` takes.

    Raises:
        UserError: one line for each mistake.
    """
    methods, seeds = (list(dict.fromkeys(filter(None, w.split(",")))) for w in (arguments.methods, arguments.seeds))
    if not methods or not seeds or not all(re.fullmatch(r"\d+", seed, re.ASCII) for seed in seeds):
        raise UserError(
            f"--methods {arguments.methods} --seeds {arguments.seeds}: names and whole numbers, such as e3va,full and 0,1,2"
        )
    for override in parse(arguments.overrides):
        if override.key_or_group in RESERVED:
            raise UserError(f"{override.input_line}: is set by {RESERVED[override.key_or_group]}; leave it out")
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value at a time; start this script once for each")
    root, output = arguments.root, arguments.output or Path("runs") / "reproduce" / arguments.experiment
    root, output = (path.expanduser().resolve() for path in (root, output))
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; scripts/download.py makes one")
    plan = Plan(arguments.experiment, root, methods, [int(seed) for seed in seeds], output, arguments.overrides)
    mistakes: list[str] = []
    for run in (plan.run(method, plan.seeds[0]) for method in methods):
        try:
            checked("train", run.words)
        except UserError as error:
            mistakes += error.messages
    if mistakes:
        raise UserError(*dict.fromkeys(mistakes))
    for run in [*plan.finished(), *(run for run in plan.runs if run.state == "interrupted")]:
        require_same(run)
    return plan


def require_same(run: Run) -> None:
    """Refuse to mix runs under different options in one folder; the data may have moved."""
    there, here = (
        {o.key_or_group: str(o.input_line) for o in parse(words) if o.key_or_group not in RESERVED or o.key_or_group == "adapter"}
        for words in (overrides_of(run.folder), run.words)
    )
    if there != here:
        theirs, ours = (
            " ".join(word for key, word in one.items() if other.get(key) != word) or "nothing"
            for one, other in ((there, here), (here, there))
        )
        raise UserError(
            f"{run.folder}: was run under other options, {theirs} in place of {ours}; "
            "give the same ones again, or another --output"
        )
