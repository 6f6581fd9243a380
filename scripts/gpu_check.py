"""Everything that needs a CUDA GPU, in one call: its tests, and the measured benchmark in both published settings.

    make gpu-check                       # or: python scripts/gpu_check.py [OUTPUT_FOLDER]

Leaves `benchmark.json`, `details.json` and `memory.png` of each setting, and `summary.json`, under
`benchmarks/GPU_NAME/DATE/`. Exit code 1 if a test fails; a claim that does not hold is a result, and is written down.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time
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


def main() -> None:
    """Run the tests, then the benchmarks; go on where one fails."""
    if not torch.cuda.is_available():
        sys.exit("make gpu-check needs a CUDA GPU, and PyTorch finds none; `e3va benchmark-memory` plans without one")
    device = torch.cuda.get_device_name()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    default = ROOT / "benchmarks" / re.sub(r"\W+", "_", device) / date
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q"], cwd=ROOT).returncode
    summary: dict[str, object] = {"device": device, "date": date, "versions": versions(), "tests_exit_code": tests}
    for name, words in benchmarks().items():
        folder = out / name
        command = ["benchmark-memory", "measure=true", *words, f"hydra.run.dir={as_value(str(folder))}"]
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "e3va_cli", *command], cwd=ROOT).returncode
        result = folder / "benchmark.json"
        summary[name] = {
            "command": " ".join(["e3va", *command[:-1]]),
            "exit_code": code,
            "seconds": round(time.perf_counter() - started, 1),
            "claims": json.loads(result.read_text())["claims"] if result.is_file() else None,
        }
        write_json(out / "summary.json", summary)
    print(f"Results: {out}")
    sys.exit(0 if tests == 0 else 1)


if __name__ == "__main__":
    main()
