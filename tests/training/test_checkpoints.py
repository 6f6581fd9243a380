"""A checkpoint is gone on with only if its weights and optimizer are those of the run."""

import copy
import shutil

import pytest
import torch

from e3va_cli.config.composition import load_config
from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError
from e3va_cli.training.checkpoints import (
    METADATA_KEY,
    MODEL_PREFIX,
    check_metadata,
    check_optimizer_state,
    check_state_dict,
    read_checkpoint,
)
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of one step and its checkpoint."""
    config = load_config("train", [*SMALL, "trainer.max_steps=1", "trainer.limit_val_batches=0"])
    folder = tmp_path_factory.mktemp("run")
    run = build_run(config, folder)
    run.trainer.fit(run.lightning_module, run.data)
    return run, last(folder)


@pytest.fixture
def content(saved):
    return copy.deepcopy(read_checkpoint(saved[1]))


def weights(content):
    return {name.removeprefix(MODEL_PREFIX): value for name, value in content["state_dict"].items()}


def test_its_own_run_takes_it(saved, content):
    run, path = saved
    check_state_dict(weights(content), run.model, path)
    check_optimizer_state(content, run.lightning_module.build_optimizer(run.model), path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state, name: state.update({f"{name}x": state.pop(name)}), "unexpected weights"),
        (lambda state, name: state.pop(name), "missing weights"),
        (lambda state, name: state.update({name: state[name][:1]}), "weights with a wrong shape or dtype"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, content, change, says):
    run, path = saved
    state = weights(content)
    change(state, "extractor.adapters.0.0.down.A")
    with pytest.raises(UserError, match=rf"last.ckpt: {says}: extractor.adapters.0.0.down.A"):
        check_state_dict(state, run.model, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda state: state["state"][3].update(exp_avg=torch.zeros(2)),
            "state of parameter 3 has a wrong shape",
        ),
        (lambda state: state["state"].pop(0), "optimizer state is missing for 1 parameters"),
        (lambda state: state["param_groups"][0]["params"].pop(), "parameters, not of"),
        (lambda state: state["state"][0].pop("exp_avg"), "no state of AdamW"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(saved, content, change, says):
    run, path = saved
    change(content["optimizer_states"][0])
    with pytest.raises(UserError, match=says):
        check_optimizer_state(content, run.lightning_module.build_optimizer(run.model), path)


def test_the_command_refuses_it(short_run, tmp_path, e3va):
    run = shutil.copytree(short_run, tmp_path / "run")
    content = torch.load(last(run), weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith("up.A"))
    content["state_dict"][f"{name}_"] = content["state_dict"].pop(name)
    torch.save(content, last(run))
    done = e3va("train", f"resume={run}", "trainer.max_epochs=2", expect=2)
    assert "last.ckpt: unexpected weights" in done.stderr


@pytest.mark.parametrize(
    ("part", "option", "binds"),
    [
        ("head", "score_threshold", False),
        ("head", "detections_per_image", False),
        ("head", "recompute_neck", False),
        ("head", "fg_iou", True),
        ("adapter", "rank", True),
        ("adapter", "activations", False),
    ],
)
def test_options_may_change_where_weights_do_not_depend_on_them(saved, content, part, option, binds):
    about = copy.deepcopy(content[METADATA_KEY])
    about[part][option] = "another"
    if not binds:
        check_metadata(content, saved[1], about)
        return
    with pytest.raises(UserError, match=f"another {part}; different options: {option}"):
        check_metadata(content, saved[1], about)


def test_the_same_word_can_bind_in_one_place_and_not_in_another(config):
    from e3va_cli.training.checkpoints import checkpoint_options

    head = to_dict(config("head=mask_rcnn_nano").head)
    changed = copy.deepcopy(head)
    changed["box"]["nms_iou"] = 0.9  # of predictions
    assert checkpoint_options("head", head) == checkpoint_options("head", changed)
    changed["rpn"]["nms_iou"] = 0.9  # of proposals, which training samples from
    assert checkpoint_options("head", head) != checkpoint_options("head", changed)
