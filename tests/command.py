"""The `e3va` command in a process of its own, forked from one that has imported PyTorch and all that it needs."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from unittest.mock import patch

import torch

from e3va_cli import cli

ENVIRONMENT = {"COLUMNS": "200", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
TIMEOUT_S = 600
Output = Literal["file", "ascii", "gone", "closed", "full"]  # what standard output is: a pipe without a reader, `>&-`

# Where there is a GPU, each process imports for itself: CUDA works in no process forked from one that has asked for it.
PROCESSES = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PROCESSES.set_forkserver_preload([f"e3va_cli.commands.{name.replace('-', '_')}" for name in cli.COMMANDS])


def run_command(words: Sequence[str], cwd: Path, output: Output = "file") -> subprocess.CompletedProcess[str]:
    """Run `e3va WORDS` in the folder `cwd`."""
    with TemporaryDirectory() as folder:
        streams = (Path(folder, "stdout"), Path(folder, "stderr"))
        with patch.dict(os.environ, ENVIRONMENT):
            process = PROCESSES.Process(target=_command, args=(words, cwd, dict(os.environ), streams, output))
            process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"e3va {' '.join(words)} took more than {TIMEOUT_S} s")
        return subprocess.CompletedProcess(
            words, process.exitcode, *(stream.read_text(encoding="utf-8") for stream in streams)
        )


def _command(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str], streams: Sequence[Path], output: Output
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    _change(output)
    sys.argv = [str(Path(cli.__file__).with_name("__main__.py")), *words]
    cli.main()


def _change(output: Output) -> None:
    """Make standard output what Python finds it to be when it starts in such a place."""
    if output == "ascii":
        sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]
    elif output == "gone":
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    elif output == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
    elif output == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
