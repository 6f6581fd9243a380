import pytest

from e3va_cli.errors import UserError
from e3va_cli.runs.folder import find_checkpoint


def test_a_checkpoint_from_wherever_one_stands(tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoints" / "old").mkdir(parents=True)
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("[]")
    (run / "checkpoints" / "last.ckpt").touch()
    elsewhere.mkdir()
    (elsewhere / "kept.ckpt").touch()
    (run / "checkpoints" / "best.ckpt").symlink_to(elsewhere / "kept.ckpt")
    for folder, given in (
        (tmp_path, "run"),
        (tmp_path, "run/checkpoints/last.ckpt"),
        (run, "."),
        (run, "checkpoints/last.ckpt"),
        (run / "checkpoints", "last.ckpt"),
        (run / "checkpoints", ".."),
        (run / "checkpoints" / "old", "../last.ckpt"),
        (run / "checkpoints", "best.ckpt"),
    ):
        monkeypatch.chdir(folder)
        found, checkpoint = find_checkpoint(given, "checkpoint")
        assert found.samefile(run), (folder, given)
        assert checkpoint.absolute().parent.samefile(run / "checkpoints"), (folder, given)


def test_a_device_is_no_run():
    with pytest.raises(UserError, match="resume=/dev/null: not a run"):
        find_checkpoint("/dev/null", "resume")
