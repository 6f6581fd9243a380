import pytest

from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.config.run_config import to_dict

OTHER = [
    "dataset=voc",
    "dataset.root=it's a \\ place, {odd}=[1]",
    "dataset.classes=['traffic light','a,b']",
    "head=retinanet",
    "head.aspect_ratios=[0.5,1e-3]",
    "head.score_threshold=0.2",
    "adapter=lora",
    "adapter.rank=3",
    "+backbone.model_args.window_size=4",
    "trainer.precision=bf16-mixed",
    "trainer.limit_val_batches=3",
    "data.val_batch_size=7",
    "seed=5",
]


def quoted(word):
    key, _, value = word.partition("=")
    return word if value[0] in "[0123456789" or value.isidentifier() else f'{key}="{value}"'


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["head=upernet_nano", "dataset=ade20k", "dataset.root=x", "head.slide_window=64"],
        ["experiment=coco_cascade_swin_b", "dataset.root=x", "head.box.loss=smooth_l1"],
        [*map(quoted, OTHER)],
    ],
)
def test_the_words_compose_the_same_again(config, words):
    first = to_dict(config(*words))
    again = to_dict(config(*overrides_of_config(first)))
    first["dataset"]["num_classes"] = again["dataset"]["num_classes"]  # told by the data, but for two formats
    assert again == first
