"""Configuration files: numbers are numbers, unknown keys are refused with a suggestion, nothing is read by nobody."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from posttrain import ConfigError
from posttrain.runner.config import load_config
from posttrain.runner.documents import parse_value, read_document
from posttrain.runner.methods import METHODS, check_keys, fields_of, trainer_of
from posttrain.runner.recipes import read_recipe, recipe_names

MINIMAL = "model: {name: some/model}\ndataset: {path: train.jsonl}\n"


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("1_000", 1000), ("on", "on"), ("no", "no"), ("off", "off"),
     ("true", True), ("null", None), ("[a, 1]", ["a", 1]), ("v1.2.3", "v1.2.3"), ("1e", "1e"), ("2024-01-02", None)],
)  # fmt: skip
def test_values_are_what_people_mean(text: str, value: object) -> None:
    if text.startswith("2024"):
        assert str(parse_value(text)) == text
    else:
        assert parse_value(text) == value
        assert type(parse_value(text)) is type(value)


def test_a_broken_file_is_named_with_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:3:1"):
        read_document(write(tmp_path, "a: 1\nb: [1, 2\n"))
    with pytest.raises(ConfigError, match=r"run.json:2:3: Expecting property name"):
        read_document(write(tmp_path, '{"a": 1,\n  // no\n"b": 2}', "run.json"))


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:2:1: key 'a' stands twice"):
        read_document(write(tmp_path, "a: 1\na: 2\n"))
    with pytest.raises(ConfigError, match=r"key 'a' stands twice"):
        read_document(write(tmp_path, '{"a": 1, "a": 2}', "run.json"))


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "real.yaml")
    with pytest.raises(ConfigError, match=r"real.yaml"):
        read_document(tmp_path / "rael.yaml")


def test_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training: {learning_rate: 1e-3}\n")
    config = load_config(
        path, ["training.learning_rate=2e-4", "lora.target_modules=[q_proj]", "dataset.val_path=v.jsonl"]
    )
    assert config.training == {"learning_rate": 2e-4}
    assert config.lora.target_modules == ["q_proj"]
    assert config.dataset.val_path == "v.jsonl"
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(path, ["learning_rate"])


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("lora: {rank: 8}", "lora.rank is not a known key", "known: "),
        ("lora: {lora_alhpa: 8}", "lora.lora_alhpa is not a known key", "did you mean lora.lora_alpha?"),
        ("modle: {}", "modle is not a known key", "did you mean model?"),
        ("lora: {r: many}", "lora.r is 'many'", None),
        ("method: dpoo", "method is 'dpoo'", None),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, line: str, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL + line + "\n"))
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    "override",
    ["model.load_in_4bit=true", "save.gguf_path=a.gguf", "save.merged_path=m", "lora.finetune_vision_layers=true"],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(write(tmp_path, MINIMAL), [override])


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.path is missing"):
        load_config(write(tmp_path, "model: {name: m}\ndataset: {}\n"))


def test_json_files_work_too(tmp_path: Path) -> None:
    document = {"model": {"name": "m"}, "dataset": {"path": "p"}, "training": {"learning_rate": 2e-4}}
    assert load_config(write(tmp_path, json.dumps(document), "c.json")).training["learning_rate"] == 2e-4


@pytest.mark.parametrize("name", list(recipe_names()))
def test_recipes_are_short_and_valid(tmp_path: Path, name: str) -> None:
    text = read_recipe(name)
    assert len(text.splitlines()) <= 25
    assert load_config(write(tmp_path, text)).method == name


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="sft"):
        read_recipe("nope")


@pytest.mark.parametrize(
    ("dataset", "message", "hint"),
    [
        ("{mixture: [{path: a, wieght: 2}]}", "dataset.mixture.0.wieght is not a known key",
         "did you mean dataset.mixture.0.weight?"),
        ("{mixture: [{path: a, weight: -2}]}", "dataset.mixture.0.weight is -2: input should be greater than 0", None),
        ("{mixture: [{weight: 1}]}", "dataset.mixture.0.path is missing", None),
        ("{path: b, mixture: [{path: a}]}", "dataset.path and dataset.mixture are both given", None),
    ],
)  # fmt: skip
def test_mistakes_in_a_mixture(tmp_path: Path, dataset: str, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(write(tmp_path, f"model: {{name: m}}\ndataset: {dataset}\n"))
    assert hint in (None, caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('x: "\\x00"', "unacceptable character"),
        ("? [a, b]\n: 1", "a key must be a word, this is a list"),
        ("", "holds nothing"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("model: 3\ndataset: {path: a}", "model is 3, not a section"),
        ("dataset: {path: a}", "model is missing"),
        (MINIMAL + "save: {gguf_quantization: zzz}", "save.gguf_quantization is 'zzz'"),
        (MINIMAL + "lora: {lora_dropout: -1}", "lora.lora_dropout is -1"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode().replace(b"\\x00", b"\x00"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(path)


def test_a_key_that_stands_twice_in_json_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"model": {"name": "a"},\n "dataset": {"path": "a"},\n "model": {}}')
    with pytest.raises(ConfigError, match=r"a\.json:3: key 'model' stands twice"):
        load_config(path)
    path.write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(path)


@pytest.mark.parametrize(
    ("training", "message"),
    [("{learning_rate: abc}", "training.learning_rate='abc'"), ("{max_steps: 2.5}", "training.max_steps=2.5"),
     ("{packing: maybe}", "training.packing='maybe'")],
)  # fmt: skip
def test_settings_are_named_as_they_stand_in_the_file(tmp_path: Path, training: str, message: str) -> None:
    from posttrain.runner.train import _training_arguments

    path = write(tmp_path, f"{MINIMAL}training: {training}\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")):
        _training_arguments(load_config(path), tmp_path, path, quiet=True)
    zero = write(tmp_path, f"{MINIMAL}\n".replace("some/model", "some/model, max_seq_length: 0"))
    with pytest.raises(ConfigError, match=r"model.max_seq_length=0 must be at least 1"):
        _training_arguments(load_config(zero), tmp_path, zero, quiet=True)


def test_methods(tmp_path: Path) -> None:
    text = "model: {name: m}\ndataset: {path: p}\nmethod: dop\n"
    with pytest.raises(ConfigError, match=r"method is 'dop'") as caught:
        load_config(write(tmp_path, text))
    assert caught.value.hint == "did you mean dpo?"
    assert load_config(write(tmp_path, text), ["method=dpo"]).method == "dpo"
    for method in METHODS:
        assert {"learning_rate", "max_length"} <= fields_of(method)
        assert trainer_of(method).__name__.lower() == f"{method}trainer"


def test_what_a_method_has_no_use_for_is_refused(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "method: dpo\nmodel: {name: m}\ndataset: {path: p, train_on: all}\n"))
    with pytest.raises(ConfigError, match=r"dataset\.train_on='all' is not honoured with method dpo"):
        check_keys("dpo", config.dataset, "c.yaml")
    check_keys("sft", config.dataset, "c.yaml")
