import pytest

from e3va_cli.training.course import plan_course


@pytest.fixture
def course(config):
    def of(*overrides, batches_per_epoch=100, devices=1):
        return plan_course(config(*overrides), batches_per_epoch=batches_per_epoch, devices=devices)

    return of


RECIPE = ["schedule.total_batch=16", "schedule.warmup_steps=500", "optimizer.lr=1e-4", "data.batch_size=2"]


def test_at_the_recipes_batch_nothing_changes(course):
    of = course(*RECIPE, "trainer.accumulate_grad_batches=4", "trainer.max_epochs=3", devices=2)
    assert (of.total_batch, of.lr, of.warmup_steps) == (16, 1e-4, 500)
    assert (of.steps_per_epoch, of.total_steps, of.rescaled) == (25, 75, False)


@pytest.mark.parametrize(("scaling", "lr"), [("linear", 1.25e-5), ("sqrt", 1e-4 / 8**0.5), ("none", 1e-4)])
def test_a_smaller_batch_takes_more_and_smaller_steps(course, scaling, lr):
    of = course(*RECIPE, f"schedule.lr_scaling={scaling}", "schedule.iterations=1000", "trainer.max_epochs=null")
    assert of.lr == pytest.approx(lr)
    assert (of.total_batch, of.warmup_steps, of.total_steps, of.rescaled) == (2, 4000, 8000, True)


def test_a_larger_batch_takes_fewer(course):
    of = course(*RECIPE, "schedule.iterations=1000", "trainer.max_epochs=null", devices=16)
    assert (of.total_batch, of.lr, of.warmup_steps, of.total_steps) == (32, 2e-4, 250, 500)


def test_max_steps_means_what_it_says(course):
    of = course(*RECIPE, "schedule.iterations=1000", "trainer.max_epochs=null", "trainer.max_steps=7")
    assert of.total_steps == 7


def test_a_recipe_without_a_batch_holds_for_any(course):
    of = course("schedule.total_batch=null", "schedule.warmup_steps=50", "optimizer.lr=1e-3", "data.batch_size=3")
    assert (of.lr, of.warmup_steps, of.rescaled) == (1e-3, 50, False)


def test_an_epoch_is_what_is_trained_on(course):
    words = ["trainer.limit_train_batches=10", "trainer.accumulate_grad_batches=4", "trainer.max_epochs=2"]
    of = course(*words)
    assert (of.steps_per_epoch, of.total_steps) == (3, 6)
