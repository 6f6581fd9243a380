"""A run whose folder can no longer be written: one line, exit code 2, the last checkpoint whole; tried for real."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from e3va_cli.commands.error_handling import friendly_errors
from e3va_cli.errors import UserError
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last
from tests.training.test_resume import At

WORDS = [*SMALL, "trainer.tensorboard=true", "trainer.checkpoint_every_steps=1"]
SCRIPT = """
mount -t tmpfs -o "size=$1k" none "$2" && shift 2 && "$@"
code=$?
ls -A run run/checkpoints 2>/dev/null
exit $code
"""


def end(config, folder, act, *words):
    """The line that a run ends with whose folder something happens to before its third step."""
    run = build_run(config(*WORDS, *words), folder)
    run.trainer.callbacks[:0] = [At(act, train=3)]
    with pytest.raises(UserError) as refused, friendly_errors(folder, str, then=lambda: ", then RESUME"):
        run.trainer.fit(run.lightning_module, run.data)
    (line,) = refused.value.messages
    return line


@pytest.mark.parametrize("tensorboard", ["true", "false"])
@pytest.mark.parametrize("act", [shutil.rmtree, lambda folder: folder.rename(f"{folder}-2")], ids=["deleted", "moved"])
def test_a_folder_that_goes_away(config, tmp_path, capfd, act, tensorboard):
    folder = tmp_path / "run"
    line = end(config, folder, lambda: act(folder), f"trainer.tensorboard={tensorboard}")
    assert "run was deleted or moved" in line and "Traceback" not in capfd.readouterr().err
    assert not folder.exists()
    if (tmp_path / "run-2").exists():
        assert torch.load(last(tmp_path / "run-2"), weights_only=True)["global_step"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_becomes_read_only(config, tmp_path):
    folder = tmp_path / "run"
    line = end(config, folder, lambda: folder.chmod(0o500))
    folder.chmod(0o700)
    assert "Permission denied" in line and line.endswith("make its folder writable, then RESUME")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("kib", [4, 16, 24, 40, 1500, 8000])
def test_a_small_disk(tmp_path, kib):
    (tmp_path / "run").mkdir()
    command = ["unshare", "-m", "sh", "-c", SCRIPT, "sh", str(kib), "run", sys.executable, "-m", "e3va_cli", "train"]
    done = subprocess.run([*command, *WORDS, "hydra.run.dir=run"], cwd=tmp_path, capture_output=True, text=True)
    if "permission denied" in done.stderr.lower() or "not permitted" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("e3va: error: ") and "cannot be written: No space left on device" in line
    assert ".tmp" not in done.stdout and ("last.ckpt" in done.stdout) == (kib >= 1500)
