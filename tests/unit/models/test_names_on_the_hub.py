"""Models by a name on the hub, where there is no hub: said once, within seconds, and in our words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import RepositoryNotFoundError

from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.models import load
from tests.doctor_files import plain, write
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

NAME = "some-owner/SomeModel"
RETRIES = "huggingface_hub.utils._http"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that the hub, which cannot be reached, is asked for."""
    names: list[str] = []

    def model_info(_: Any, name: str, **options: Any) -> None:
        names.append(name)
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(load.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    load._silence.cache_clear()
    yield names
    load._silence.cache_clear()


def test_it_is_said_in_one_line(asked: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", plain(3))
    for _ in range(2):
        assert main(["data", "stats", str(path), "--model", NAME]) == 2
        assert capfd.readouterr().err == (
            f"E-CONFIG-0001 cannot load the model '{NAME}': there is no such folder, and the hub cannot be reached: "
            "Name or service not known\n"
            "  = give a folder with config.json and safetensors, a hub id, or 'smollm2-135m-instruct'\n"
        )
    assert asked == [NAME], "once"


def test_what_was_downloaded_before_is_read(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chatml_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen: list[dict[str, Any]] = []

    def cached(kind: Any, name: str) -> Any:
        whole = kind.from_pretrained

        def from_pretrained(path: str, **options: Any) -> Any:
            seen.append(options)
            logging.getLogger(RETRIES).warning("Retrying in 1s [Retry 1/5].")
            return whole(str(tmp_path), **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        cached(kind, NAME)
    load.load_tokenizer(NAME)
    load.load_model(NAME)
    assert [options["local_files_only"] for options in seen] == [True, True]
    assert caplog.text.count("read what was downloaded before (HF_HUB_OFFLINE=1 does so without asking the hub)") == 2
    assert "Retrying" not in caplog.text
    assert asked == [NAME]
    logging.getLogger(RETRIES).warning("Retrying in 1s [Retry 1/5].")
    assert "Retrying" in caplog.text, "others' requests are theirs"


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "some/folder/deep"])
def test_paths_are_not_asked_for(name: str, asked: list[str]) -> None:
    with pytest.raises(ConfigError, match="cannot load the model"):
        load.load_tokenizer(name)
    assert asked == []


def test_what_the_hub_answers_is_for_transformers_to_find(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Any, name: str, **options: Any) -> None:
        raise RepositoryNotFoundError("401", response=SimpleNamespace(headers={}, request=None, status_code=401))

    def from_pretrained(path: str, **options: Any) -> Any:
        assert "local_files_only" not in options
        raise OSError(f"{path} is not a local folder and is not a valid model identifier")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ConfigError, match="is not a valid model identifier"):
        load.load_tokenizer(NAME)


def test_offline_nobody_is_asked(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **options: path)
    assert load.load_tokenizer(NAME) == NAME
    monkeypatch.setattr(load.constants, "HF_HUB_OFFLINE", False)
    assert load.load_tokenizer(NAME, {"local_files_only": True}) == NAME
    assert asked == []
