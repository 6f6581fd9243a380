"""What `e3va train` does before it trains; whole runs are in tests/training."""

from e3va_cli.commands.train import prepare
from e3va_cli.run_folder import claim_folder, locate, new_folder


def test_what_a_killed_run_half_wrote_is_cleared(tmp_path):
    (tmp_path / ".last.ckpt.12.tmp").write_text("half")
    (tmp_path / "last.ckpt").write_text("last")
    prepare(tmp_path, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "last"


def test_the_checkpoint_that_is_resumed_becomes_the_last_one(tmp_path):
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).write_text(name)
    prepare(tmp_path, tmp_path / "best.ckpt")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"best.ckpt"}


def test_a_run_killed_before_its_first_checkpoint_may_be_resumed(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[]")
    _, checkpoint = locate(str(tmp_path), "resume")
    assert not checkpoint.exists()


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = tmp_path / "runs" / "2026-11-21_12-00-00_train"
    assert [claim_folder(name).name[len(name.name) :] for _ in range(3)] == ["", "-2", "-3"]
    assert new_folder(str(name)) == new_folder(str(name)) == f"{name}-4", "Hydra asks again, and means the same"
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert new_folder(f"{name}x") == f"{name}x" and not (tmp_path / "runs" / f"{name.name}x").exists()
