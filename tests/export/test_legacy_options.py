"""What was trained before an option existed is used as it was trained, and that is said."""

import json
import shutil

import pytest
import torch
import yaml

from e3va_cli.commands.saved_config import with_saved_config
from e3va_cli.config.run_config import LegacyWarning
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import build_trained_backbone, build_trained_model, read_checkpoint_or_adapter
from e3va_cli.inference.predictor import load_adapters
from e3va_cli.models.necks.rescale import Rescale
from e3va_cli.training.checkpoints import METADATA_KEY, check_metadata
from tests.export.crafted_runs import SMALL, aged, craft
from tests.export.test_adapter_folder import export, forge


def make_old(about):
    """Leave out what an older version did not write, in place."""
    about["config"] = aged(about["config"])
    about["head"] = about["config"]["head"]


def made_old(run):
    """Turn a run folder into one of an older version; returns it."""
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    make_old(content[METADATA_KEY])
    torch.save(content, path)
    (run / "config.yaml").write_text(yaml.safe_dump(content[METADATA_KEY]["config"]))
    return run


@pytest.fixture
def old_run(tmp_path):
    return made_old(craft(tmp_path / "old", *SMALL))


@pytest.fixture(params=["run", "adapter"])
def old(request, tmp_path, old_run):
    """A run and an adapter of an older version."""
    if request.param == "run":
        return old_run
    folder = export(craft(tmp_path / "new", *SMALL), tmp_path / "adapter")
    forge(folder, make_old)
    return folder


def features(place):
    trained = read_checkpoint_or_adapter(str(place), "checkpoint")
    model = build_trained_model(trained, *build_trained_backbone(trained))
    images = torch.rand(1, 3, 120, 104, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.extractor(images)


def test_old_weights_are_used_as_they_were_trained(old, tmp_path):
    with pytest.warns(LegacyWarning, match=f"{old}.*: made by an older e3va.*backbone.pad_before_shift=false"):
        found = features(old)
    expected = features(craft(tmp_path / "same", *SMALL, "backbone.pad_before_shift=false"))
    others = features(craft(tmp_path / "others", *SMALL))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.allclose(found[0], others[0], atol=1e-3)


def test_an_evaluation_of_old_weights_is_told_the_same(old):
    assert "backbone.pad_before_shift=false" in with_saved_config("evaluate", [], str(old))


def test_an_old_run_resumes_as_it_began(old_run):
    with pytest.warns(LegacyWarning):
        words = with_saved_config("train", [f"resume={old_run}"], str(old_run))
    assert "backbone.pad_before_shift=false" in words
    content = torch.load(old_run / "checkpoints" / "last.ckpt", weights_only=True)
    about = json.loads(json.dumps(content[METADATA_KEY]))
    about["config"]["backbone"]["pad_before_shift"] = True
    with pytest.raises(UserError, match=r"trained with backbone.pad_before_shift=false; set it"):
        check_metadata(content, old_run, about)
    about["config"]["backbone"]["pad_before_shift"] = False
    check_metadata(content, old_run, about)


@pytest.mark.filterwarnings("ignore::e3va_cli.config.run_config.LegacyWarning")
def test_old_and_new_adapters_do_not_share_a_pass(old_run, tmp_path):
    new = craft(tmp_path / "new_run", *SMALL)
    with pytest.raises(UserError, match=r"pad_before_shift: .*old.*\(false\), .*\(true\); run them"):
        load_adapters([old_run, new])
    load_adapters([old_run, shutil.copytree(old_run, tmp_path / "another")])


@pytest.mark.parametrize("exported", [False, True], ids=["run", "adapter"])
def test_weights_older_than_the_neck_have_the_default_one(tmp_path, exported, recwarn):
    vit = ["backbone=dinov3_s", "+backbone.model_args={depth: 4, embed_dim: 64, num_heads: 2}", *SMALL]
    runs = {neck: craft(tmp_path / neck, *vit, f"neck={neck}") for neck in ("rescale", "simple_pyramid")}
    states = {neck: read_checkpoint_or_adapter(str(run), "checkpoint").state_dict for neck, run in runs.items()}
    assert states["rescale"].keys() > states["simple_pyramid"].keys(), "the norms of the other stages"
    place = export(runs["rescale"], tmp_path / "adapter") if exported else runs["rescale"]
    if exported:
        forge(place, lambda about: about["config"].pop("neck"))
    else:
        content = torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)
        del content[METADATA_KEY]["config"]["neck"]
        torch.save(content, place / "checkpoints" / "last.ckpt")
        (place / "config.yaml").write_text(yaml.safe_dump(content[METADATA_KEY]["config"]))
    trained = read_checkpoint_or_adapter(str(place), "checkpoint")
    model = build_trained_model(trained, *build_trained_backbone(trained))
    assert trained.config.neck == "rescale" and type(model.rescale) is Rescale
    assert "neck='rescale'" in with_saved_config("evaluate", [], str(place))
    about = {**trained.metadata, "config": {**trained.metadata["config"], "neck": "simple_pyramid"}}
    with pytest.raises(UserError, match=r"trained with neck=rescale; set it$"):
        check_metadata({METADATA_KEY: trained.metadata}, place, about)
    assert not [one for one in recwarn if one.category is LegacyWarning], "nothing differs from a new run"


def test_the_command_says_it_in_one_line(old_run, e3va, tmp_path):
    done = e3va("export-adapter", f"checkpoint={old_run}", f"output={tmp_path}/exported")
    (line,) = [line for line in done.stderr.splitlines() if "older" in line]
    assert line.startswith("e3va: note: ") and "pad_before_shift=false" in line
    written = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert written["config"]["backbone"]["pad_before_shift"] is False
