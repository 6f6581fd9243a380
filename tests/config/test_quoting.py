import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from e3va_cli.config.composition import load_config, parse
from e3va_cli.config.quoting import quote_overrides, text_options
from e3va_cli.errors import UserError
from e3va_cli.utils.command_line import format_command

TEXTS = [
    "my photos (1)", "C:\\data\\x", "C:\\my data\\", "\\\\host\\share (1)\\x", "a=b", "a,b", " a ", "a # b", "~x",
    "$HOME/x", "{a}", "{a: b}", "😀/x", "it's", '"q', "1e3", "007", "1_0", "true", "[a]", "[a].jpg", "f(1)", "a\\'b",
    "it's \\", "猫 é", "a;b", "a\tb", "'a' b", "100%", "a&b|c>d", "\u202fnarrow\u00a0space",
    "-5", "nan", "[a,b", "photos[1].jpg", "a:b",
]  # fmt: skip


def value_of(word):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_what_was_typed(text):
    [word] = quote_overrides("predict", [f"output={text}"])
    assert value_of(word) == text or text == "-5" or text == "nan" or str(value_of(word)) == text
    config = load_config("predict", [word, "checkpoint=A", "input=B"])
    assert config.output == text
    assert quote_overrides("predict", [word]) == [word]  # which a run keeps, and a further process reads again


@pytest.mark.parametrize("text", TEXTS)
def test_a_printed_command_gives_it_again(text):
    *_, word = shlex.split(format_command("predict", {"output": text}))
    assert value_of(*quote_overrides("predict", [word])) == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("checkpoint=[A,my run (1)]", ["A", "my run (1)"]),
        ("checkpoint=['a b',x y z,it's]", ["a b", "x y z", "it's"]),
        ("checkpoint=[A,B]", ["A", "B"]),
        ("input='quoted (1)'", "quoted (1)"),
        ("input=photos/*.jpg", "photos/*.jpg"),
        ("input=null", None),
        ("score_threshold=0.5", 0.5),
        ("image_size=[512,512]", [512, 512]),
        ("output=${oc.env:HOME}/x", "${oc.env:HOME}/x"),
        ("output=", ""),
    ],
)
def test_what_was_meant_for_hydra_stays(word, value):
    assert value_of(*quote_overrides("predict", [word])) == value


def test_a_dollar_that_looks_nothing_up_is_text():
    for text in ("a${b", "a ${b} (1)"):
        words = quote_overrides("predict", [f"output={text}", "checkpoint=A", "input=B"])
        assert load_config("predict", words).output == text
    [word] = quote_overrides("train", ["hydra.run.dir=runs/${now:%Y} (1)"])
    assert value_of(word) == "runs/${now:%Y} (1)"


def test_commas_separate_jobs_under_m(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quote_overrides("train", ["dataset.root=/a,/b"], multirun=True) == ["dataset.root=/a,/b"]
    [word] = quote_overrides("train", ["dataset.root=/a,/b (1)"], multirun=True)
    assert list(parse([word])[0].sweep_string_iterator()) == ["/a", "'/b (1)'"]
    (tmp_path / "a,b").mkdir()
    with pytest.raises(UserError) as error:
        quote_overrides("train", ["dataset.root=a,b"], multirun=True)
    told = str(error.value)
    typed = shlex.split(told[told.index("type ") :].removeprefix("type ").split(", for jobs")[0])
    assert value_of(*quote_overrides("train", typed, multirun=True)) == "a,b"


def test_a_file_of_that_name_is_meant_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "[a]", "[c d,e]"):
        (tmp_path / name).mkdir()
        assert value_of(*quote_overrides("predict", [f"input={name}"])) == name
    monkeypatch.setenv("HOME", "/home/me")
    assert value_of(*quote_overrides("predict", ["input=~/x"])) == "/home/me/x"


def test_other_options_are_left_to_hydra():
    words = ["adapter.rank=4,8", "trainer.max_epochs=1_0", "dataset=coco", "~resume", "+a=1", "photo.jpg"]
    assert quote_overrides("train", words) == words


def test_every_path_is_known():
    known = text_options("train")
    assert {"resume", "backbone.weights", "hydra.run.dir", "dataset.train_set", "dataset.classes"} <= set(known)
    parts = {f"{part}_{what}" for part in ("train", "val") for what in ("images", "annotations", "labels")}
    assert {f"dataset.{part}" for part in parts} <= set(known)
    assert "dataset.root" in text_options("check-data") and "output" in text_options("export")
    assert text_options("evaluate")["checkpoint"] and not text_options("export-adapter")["checkpoint"]


def test_words_torn_apart_by_the_shell(tmp_path):
    with pytest.raises(UserError, match="use 'input=my photos'"):
        parse(quote_overrides("predict", ["checkpoint=A", "input=my", "photos"]))


@pytest.mark.slow
def test_runs_of_such_a_folder_go_on(e3va, tmp_path):
    run = "my runs (1)/a, b=c #1 😀 it's"
    small = ["trainer.max_steps=1", "dataset.train_images=2", "dataset.val_images=1", "num_visualizations=0"]
    assert e3va("train", *small, f"hydra.run.dir={run}").returncode == 0
    for words in (
        ("train", f"resume={run}", "trainer.max_steps=2"),
        ("evaluate", f"checkpoint={run}"),
        ("export-adapter", f"checkpoint={run}", "output=C:\\my adapter"),
        ("evaluate", "checkpoint=C:\\my adapter"),
    ):
        done = e3va(*words)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"my runs (1)", "C:\\my adapter"}
