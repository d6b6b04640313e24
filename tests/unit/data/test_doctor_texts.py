"""What single texts are searched for: each pattern with what it is for and what only looks like it."""

from __future__ import annotations

import pytest

from posttrain.data.doctor.languages import language
from posttrain.data.doctor.patterns import is_refusal, personal_data, secrets
from posttrain.data.doctor.settings import DoctorSettings, parse_settings
from posttrain.errors import ConfigError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGH"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "private key"),
        ("AK" + "IA" + "Q" * 16, "AWS key"),
        ("gh" + "p_" + LETTERS[:36], "GitHub token"),
        ("github" + "_pat_" + LETTERS, "GitHub token"),
        ("sk" + "-proj-" + LETTERS[:24], "API key"),
        ("xo" + "xb-" + "1234567890-abc", "Slack token"),
        ("h" + "f_" + LETTERS[:34], "Hugging Face token"),
        ("AI" + "za" + LETTERS[:35], "Google key"),
        ("sk" + "_live_" + LETTERS[:24], "Stripe key"),
        ("ey" + "J" + LETTERS[:12] + ".ey" + "J" + LETTERS[:12] + "." + LETTERS[:12], "JSON web token"),
    ],
)
def test_secrets(text: str, what: str) -> None:
    ((found, shown),) = secrets(f"use {text} now")
    assert found == what
    assert text not in shown
    assert shown == f"{text[:4] if len(text) >= 20 else text[:2]}… ({len(text)} characters)"


@pytest.mark.parametrize("text", ["sk-learn and task-oriented", "hf_hub_download", "AKIA", "eyJ", "ghp_short", "xoxo"])
def test_no_secrets(text: str) -> None:
    assert list(secrets(text)) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("jane.doe@posteo.de", "e-mail address"),
        ("+49 170 1234567", "phone number"),
        ("(415) 555-2671", "phone number"),
        ("DE89 3704 0044 0532 0130 00", "IBAN"),
        ("4111 1111 1111 1111", "card number"),
        ("378282246310005", "card number"),
    ],
)
def test_personal_data(text: str, what: str) -> None:
    ((found, shown),) = personal_data(f"It is {text}, call.")
    assert found == what
    assert text not in shown


@pytest.mark.parametrize(
    "text",
    ["me@example.com", "x@y.example", "@user", "4111 1111 1111 1112", "1234567890123456", "DE00 3704 0044 0532 0130 00",
     "3.1415926535897932", "2026-11-21 10:00", "1 000 000 000 000", "48/2 = <<48/2=24>>24 and 1234 + 5678 = 6912"],
)  # fmt: skip
def test_no_personal_data(text: str) -> None:
    assert list(personal_data(text)) == []


@pytest.mark.parametrize(
    "answer",
    ["As an AI language model, I have no body.", "I’m sorry, but I can’t help with that.", "N/A", " null ", "..."],
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer", ["Paris.", "I am sorry that it rains.", "No.", "x" * 400 + " as an AI language model", "It cannot fly."]
)
def test_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("This is not the way that you would take with the car.", "en"),
        ("Das ist nicht der Weg, den wir mit dem Auto nehmen, und auch nicht die andere.", "de"),
        ("Il est dans la maison avec les enfants et le chien, mais pas pour longtemps.", "fr"),
        ("El perro está en la casa con los niños, pero no es muy grande para su edad.", "es"),
        ("Het is niet zo dat de hond in het huis van een ander is.", "nl"),
        ("Это не тот путь, который мы выбрали.", "Cyrillic"),
        ("这不是我们选择的道路。", "Chinese"),
        ("これは私たちが選んだ道ではありません。", "Japanese"),
        ("이것은 우리가 선택한 길이 아닙니다.", "Korean"),
        ("def add(a, b): return a + b", None),
        ("42", None),
        ("", None),
    ],
)
def test_languages(text: str, name: str | None) -> None:
    assert language(text) == name


def test_settings_by_name() -> None:
    assert parse_settings([]) == DoctorSettings()
    assert parse_settings(["near_rows=5", "label_share = 0.5"]) == DoctorSettings(near_rows=5, label_share=0.5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("near_row=5", "did you mean near_rows?"),
        ("near_rows", "is not of the form name=value"),
        ("near_rows=many", "is not a whole number"),
        ("label_share=2", "between 0 and 1"),
        ("near_rows=-1", "from 0 on"),
        ("near_words=0", "from 1 on"),
    ],
)
def test_settings_that_are_none(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings([override])
    assert said in str(caught.value)
