import pytest

from e3va_cli.composition import parse
from e3va_cli.export.overrides import evaluation_words, model_words
from e3va_cli.run_config import to_dict

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
        ["head=upernet_nano", "dataset=ade20k", "dataset.root=x", "head.window=64"],
        ["experiment=coco_cascade_swin_b", "dataset.root=x", "head.box.loss=smooth_l1"],
        [*map(quoted, OTHER)],
    ],
)
def test_the_words_compose_the_same_again(config, words):
    first = to_dict(config(*words))
    again = to_dict(config(*evaluation_words(first)))
    for part in ("backbone", "adapter", "head", "dataset", "data", "seed", "pictures"):
        assert again[part] == first[part], part
    for key in ("precision", "limit_val_batches"):
        assert again["trainer"][key] == first["trainer"][key]


def test_model_words_leave_the_rest_open(config):
    words = model_words(to_dict(config("adapter.rank=4")))
    assert {parse([word])[0].key_or_group.split(".")[0] for word in words} == {"backbone", "adapter", "head"}
    made = config("dataset=coco", "dataset.root=x", *words)
    assert (made.dataset.name, made.head.fpn_channels, made.adapter.rank) == ("coco", 64, 4)
