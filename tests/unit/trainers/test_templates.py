"""A model takes a chat template by name: it is saved without markers, and generation stops where its turns end."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError
from posttrain.trainers.templates import take_template
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import CHATML, plain_tokenizer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_by_name(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = plain_tokenizer(extra=("<|end|>", "<|user|>"))
    model = tiny_model(vocabulary=len(tokenizer))
    model.generation_config.eos_token_id = 2
    assert take_template(model, tokenizer, "phi-3") == []
    assert "generation %}" not in tokenizer.chat_template
    assert model.generation_config.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert "chat template phi-3: <|system|>, <|assistant|> are no tokens of the tokenizer" in caplog.text
    ((tokenized,),) = prepare([ROW], tokenizer, DataSettings(assistant_only=True)).samples
    branch = tokenized.branches[0]
    assert tokenizer.decode(branch.ids[branch.supervised]) == "Hello<|end|>\n</s>"


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token of this tokenizer's"):
        take_template(tiny_model(), plain_tokenizer(), "llama-3")


def test_files_go_before_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML)
    tokenizer = plain_tokenizer()
    take_template(tiny_model(), tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == CHATML
