"""A built wheel, installed into an environment of its own, runs from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tracked sources, so that nothing is left behind in the checkout."""
    import shutil

    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("src", "conf", "weights"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_yaml_and_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"e3va_cli/conf/{path.relative_to(ROOT / 'conf')}" in names
    assert "e3va_cli/weights/swin_nano/swin_nano.safetensors" in names
    for path in (ROOT / "src" / "e3va_cli").rglob("*.py"):
        assert str(path.relative_to(ROOT / "src")) in names


def test_it_runs_from_an_empty_folder(wheel, tmp_path):
    """The dependencies are those of this environment; the package is the wheel's."""
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    env = {**os.environ, "PYTHONPATH": str(target)}

    def e3va(*words):
        return subprocess.run(
            [sys.executable, str(target / "bin" / "e3va"), *words], cwd=empty, env=env, capture_output=True, text=True
        )

    where = subprocess.run(
        [sys.executable, "-c", "import e3va_cli; print(e3va_cli.__file__)"],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
    ).stdout
    assert str(target) in where
    words = ["dataset.train_images=4", "dataset.val_images=2", "trainer.max_epochs=1", "data.batch_size=2"]
    done = e3va("train", *words)
    assert done.returncode == 0, done.stderr
    (run,) = (empty / "runs").iterdir()
    assert (run / "metrics.json").is_file() and (run / "checkpoints" / "last.ckpt").is_file()
