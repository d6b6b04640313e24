"""Names on the hub: what cannot be had is said at once, and what was downloaded before is read all the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from posttrain.data.sources import read_rows
from posttrain.errors import DataError

datasets = pytest.importorskip("datasets")
NAME = "some-owner/SomeSet"
ROWS = [{"text": "a"}, {"text": "b"}]


class Hub:
    """Stands for the hub (`dataset_info` raises `error`, or takes `seconds`) and for `datasets`, which counts how often
    it is asked to load."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.seconds = 0.0
        self.asked: list[str] = []
        self.loaded = 0

    def dataset_info(self, path: str, **options: Any) -> object:
        self.asked.append(path)
        assert options["timeout"] <= 10
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return object()

    def load_dataset(self, *_: Any, **__: Any) -> object:
        self.loaded += 1
        return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda _, path, **options: made.dataset_info(path, **options)
    )
    return made


def rows() -> list[dict[str, Any]]:
    return [row for _, row in read_rows(NAME)]


def refused() -> DataError:
    with pytest.raises(DataError) as caught:
        rows()
    assert caught.value.code == "E-DATA-0001"
    assert caught.value.hint is not None
    return caught.value


def http_error(kind: Callable[..., Exception]) -> Exception:
    return kind("401 Client Error", response=SimpleNamespace(headers={}, request=None, status_code=401))


def test_what_is_there_is_loaded(hub: Hub) -> None:
    assert rows() == ROWS
    assert (hub.asked, hub.loaded) == ([NAME], 1)


def test_a_name_that_the_hub_does_not_know(hub: Hub) -> None:
    hub.error = http_error(RepositoryNotFoundError)
    said = refused()
    assert said.message.startswith(f"{NAME}: no such file, and the hub has no data set of that name")
    assert "owner/name:config@split" in str(said.hint)
    assert hub.loaded == 0


def test_a_hub_that_cannot_be_reached(hub: Hub) -> None:
    hub.error = OSError("Name or service not known\nand more")
    said = refused()
    assert said.message.startswith(f"{NAME}: no such file, and the hub cannot be reached: Name or service not known")
    assert "and more" not in said.message
    assert "HF_HUB_OFFLINE=1" in str(said.hint)
    assert hub.loaded == 0


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT <= 10
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    hub.seconds = 20
    start = time.monotonic()
    assert "cannot be reached: no answer within 1 seconds (HF_HUB_ETAG_TIMEOUT" in refused().message
    assert time.monotonic() - start < 10
    assert hub.loaded == 0


@pytest.mark.parametrize("error", [OSError("no network"), http_error(RepositoryNotFoundError)])
def test_what_was_downloaded_before_is_read(
    hub: Hub, error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "some-owner___some_set" / "default" / "0.0.0" / "1234").mkdir(parents=True)  # as `datasets` spells it
    hub.error = error
    assert rows() == ROWS
    assert hub.loaded == 1
    assert "reading what was downloaded before (HF_HUB_OFFLINE=1 does so without asking the hub)" in caplog.text


@pytest.mark.parametrize("kind", [GatedRepoError, HfHubHTTPError])
def test_what_else_the_hub_answers_is_for_datasets_to_find(hub: Hub, kind: Callable[..., Exception]) -> None:
    hub.error = http_error(kind)
    assert rows() == ROWS
    assert hub.loaded == 1


def test_offline_the_hub_is_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.error = OSError("no network")
    assert rows() == ROWS
    assert (hub.asked, hub.loaded) == ([], 1)
