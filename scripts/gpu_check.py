"""Everything that needs a CUDA GPU, in one call: its tests, and in both published settings the benchmark and profiles.

    make gpu-check                       # or: python scripts/gpu_check.py [OUTPUT_FOLDER]

Leaves `benchmark.json`, `details.json` and `memory.png` of each setting, `NAME_profile.json` with where the time of its
steps goes, and `summary.json`, under `benchmarks/GPU_NAME/DATE/`. Exit code 1 if a test fails; a claim that does not
hold is a result, and is written down.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from e3va_cli.adapters import METHODS
from e3va_cli.export.overrides import as_value
from e3va_cli.files import write_json
from e3va_cli.machine import versions
from e3va_cli.memory.published import SETTINGS

ROOT = Path(__file__).parents[1]
EXPERIMENTS = tuple(setting.experiment for setting in SETTINGS)
SMALL_CARD = ["experiment=coco_cascade_swin_l", "data.batch_size=1", "budget=11GiB"]


def benchmarks() -> dict[str, list[str]]:
    """The words after `e3va benchmark-memory`, by the name of the folder that the results go to."""
    runs = {
        f"{setting}_batch{batch}_{precision}": [
            f"experiment={setting}",
            f"data.batch_size={batch}",
            f"trainer.precision={precision}",
            f"methods=[{','.join(METHODS)}]",
        ]
        for setting in EXPERIMENTS
        for batch in (1, 2)
        for precision in ("32", "bf16-mixed")
    }
    lean = {
        f"{setting}_{activations}": [f"experiment={setting}", f"adapter.activations={activations}", "methods=[e3va]"]
        for setting in EXPERIMENTS
        for activations in ("compress", "recompute")
    }
    compiled = {
        f"{setting}_compiled": [f"experiment={setting}", "backbone.compile=true", "methods=[frozen,e3va]"]
        for setting in EXPERIMENTS
    }
    in_16_bits = ["experiment=coco_cascade_swin_l", "data.batch_size=1", "methods=[frozen,e3va]"]
    in_16_bits += ["trainer.precision=bf16-mixed", "backbone.dtype=bfloat16"]
    small_card = {"swin_l_within_11gib": [*SMALL_CARD, "methods=[full,lora,e3va]"], "swin_l_in_16_bits": in_16_bits}
    return small_card | lean | compiled | runs


def profiles() -> dict[str, list[str]]:
    """The words after `python`, by the name of the file that the figures go to."""
    return {
        f"{setting.experiment}_profile": [
            "benchmarks/step_profile.py",
            f"--experiment={setting.experiment}",
            "--size={}x{}".format(*setting.image_size),
            "--batch-size=2",
            "--ways=full,frozen,e3va,e3va:activations=recompute,e3va:backbone.compile=true",
        ]
        for setting in SETTINGS
    }


def timed(command: Sequence[str]) -> dict[str, object]:
    """Run `command` by this Python; how that ended."""
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *command]).returncode
    return {
        "command": shlex.join(["python", *command]),
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Run the tests, then the benchmarks; go on where one fails."""
    if not torch.cuda.is_available():
        sys.exit("make gpu-check needs a CUDA GPU, and PyTorch finds none; `e3va benchmark-memory` plans without one")
    device = torch.cuda.get_device_name()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path("benchmarks", re.sub(r"\W+", "_", device), date)
    os.chdir(ROOT)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q"]).returncode
    summary: dict[str, object] = {"device": device, "date": date, "versions": versions(), "tests_exit_code": tests}
    for name, words in benchmarks().items():
        folder = out / name
        place = f"hydra.run.dir={as_value(str(folder))}"
        ended = timed(["-m", "e3va_cli", "benchmark-memory", "measure=true", *words, place])
        result = folder / "benchmark.json"
        summary[name] = {**ended, "claims": json.loads(result.read_text())["claims"] if result.is_file() else None}
        write_json(out / "summary.json", summary)
    for name, words in profiles().items():
        summary[name] = timed([*words, f"--output={out / name}.json"])
        write_json(out / "summary.json", summary)
    print(f"Results: {out}")
    sys.exit(0 if tests == 0 else 1)


if __name__ == "__main__":
    main()
