import pytest

from e3va_cli.training.run import train_schedule_from_config


@pytest.fixture
def course(config):
    def of(*overrides, batches_per_epoch=100, devices=1):
        return train_schedule_from_config(config(*overrides), batches_per_epoch=batches_per_epoch, devices=devices)

    return of


RECIPE = [
    *("schedule.total_batch=16", "schedule.warmup_steps=500", "schedule.warmup_max_fraction=1"),
    *("optimizer.lr=1e-4", "data.batch_size=2"),
]


def test_at_the_recipes_batch_nothing_changes(course):
    of = course(*RECIPE, "trainer.accumulate_grad_batches=4", "trainer.max_epochs=30", devices=2)
    assert (of.total_batch, of.lr, of.warmup_steps) == (16, 1e-4, 500)
    assert (of.steps_per_epoch, of.total_steps, of.rescaled) == (25, 750, False)


@pytest.mark.parametrize(("scaling", "lr"), [("linear", 1.25e-5), ("sqrt", 1e-4 / 8**0.5), ("none", 1e-4)])
def test_a_smaller_batch_takes_more_and_smaller_steps(course, scaling, lr):
    of = course(*RECIPE, f"schedule.lr_scaling={scaling}", "schedule.iterations=1000", "trainer.max_epochs=null")
    assert of.lr == pytest.approx(lr)
    assert (of.total_batch, of.warmup_steps, of.total_steps, of.rescaled) == (2, 4000, 8000, True)


def test_a_larger_batch_takes_fewer(course):
    of = course(*RECIPE, "schedule.iterations=1000", "trainer.max_epochs=null", devices=16)
    assert (of.total_batch, of.lr, of.warmup_steps, of.total_steps) == (32, 1e-4 * 2**0.5, 250, 500)


def test_max_steps_means_what_it_says(course):
    of = course(*RECIPE, "schedule.iterations=1000", "trainer.max_epochs=null", "trainer.max_steps=7")
    assert of.total_steps == 7


def test_a_recipe_without_a_batch_holds_for_any(course):
    of = course("schedule.total_batch=null", "schedule.warmup_steps=20", "optimizer.lr=1e-3", "data.batch_size=3")
    assert (of.lr, of.warmup_steps, of.rescaled) == (1e-3, 20, False)


def test_an_epoch_is_what_is_trained_on(course):
    words = ["trainer.limit_train_batches=10", "trainer.accumulate_grad_batches=4", "trainer.max_epochs=2"]
    of = course(*words)
    assert (of.steps_per_epoch, of.total_steps) == (3, 6)


SMALL = ["dataset=coco", "dataset.root=x", "data.batch_size=2"]  # the recipe of small data sets in COCO's format


@pytest.mark.parametrize(("images", "epochs"), [(6, 667), (50, 80), (500, 36), (117_266, 36)])
def test_a_small_data_set_is_passed_over_until_there_are_enough_steps(course, images, epochs):
    of = course(*SMALL, batches_per_epoch=images // 2)
    assert of.epochs == epochs  # 36, or as many as make up 2,000 steps
    assert of.total_steps == epochs * (images // 2) >= 2000
    assert of.stretch == epochs / 36


@pytest.mark.parametrize("images", [6, 50, 500, 117_266])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_warm_up_ends_within_a_tenth_of_the_run(course, images, batch_size):
    of = course(*SMALL, f"data.batch_size={batch_size}", batches_per_epoch=max(1, images // batch_size))
    asked = 500 * 16 // batch_size
    assert of.recipe_warmup == asked
    assert of.warmup_steps == min(asked, -(-of.total_steps // 10))


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_epochs=2"],
        ["trainer.max_epochs=2", "schedule.iterations=1000000"],
        ["schedule.min_steps=0", "schedule.epochs=2"],
    ],
)
def test_a_length_that_is_given_holds(course, words):
    of = course(*SMALL, *words, batches_per_epoch=3)
    assert (of.epochs, of.total_steps, of.stretch) == (2, 6, 1.0)


def test_iterations_that_are_given_hold_instead_of_the_recipes_epochs(course):
    of = course(
        "dataset=ade20k", "dataset.root=x", "schedule.iterations=100", "data.batch_size=16", batches_per_epoch=3
    )
    assert (of.epochs, of.total_steps, of.stretch) == (34, 102, 1.0)


def test_ade20ks_epochs_are_its_160000_iterations(course, config):
    per_epoch = 20_210 // 16
    by_epochs = course("dataset=ade20k", "dataset.root=x", "data.batch_size=16", batches_per_epoch=per_epoch)
    words = ["experiment=ade20k_upernet_swin_l", "dataset.root=x", "data.batch_size=16"]
    assert course(*words, batches_per_epoch=per_epoch) == by_epochs
    assert 160_000 <= by_epochs.total_steps < 160_000 + per_epoch
