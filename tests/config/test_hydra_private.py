"""What the package needs of private parts of Hydra and OmegaConf; a failure names the part that a new version moved."""

from omegaconf import OmegaConf

from e3va_cli.config.hydra_private import child_config, parse_arguments


def test_hydra_parses_flags_and_overrides() -> None:
    arguments = parse_arguments(["-m", "--cfg", "job", "adapter.rank=4,8", "seed=1"])
    assert (arguments.multirun, arguments.cfg) == (True, "job")
    assert arguments.overrides == ["adapter.rank=4,8", "seed=1"]
    assert not (arguments.help or arguments.hydra_help or arguments.shell_completion)


def test_omegaconf_shows_groups_without_resolving_them() -> None:
    cfg = OmegaConf.create({"group": {"a": 1}, "missing": "???", "null": None, "value": 3, "reference": "${nowhere}"})
    group = child_config(cfg, "group")
    assert group is not None and group.a == 1
    assert all(child_config(cfg, key) is None for key in ("missing", "null", "value", "reference"))
