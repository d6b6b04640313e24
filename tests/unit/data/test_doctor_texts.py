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
        ("AS" + "IA" + "Q2" * 8, "AWS key"),
        ("aws_secret_access_" + "key = " + LETTERS[:38] + "/+", "AWS secret key"),
        ("Secret" + "AccessKey': '" + LETTERS[:40], "AWS secret key"),
        ("AWS_SECRET_ACCESS_" + "KEY=" + LETTERS[:40], "AWS secret key"),
        ("gl" + "pat-" + LETTERS[:20], "GitLab token"),
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


@pytest.mark.parametrize(
    "text",
    [
        "sk-learn and task-oriented", "hf_hub_download", "AKIA", "eyJ", "ghp_short", "xoxo",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxx", "sk-proj-" + "X" * 40, "sk-your-api-key-goes-right-here-please",
        "sk-very-long-name-of-a-page-in-words", "risk-" + LETTERS, "desk-sk-" + LETTERS, "AKIAIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "glpat-xxxxxxxxxxxxxxxxxxxx", "glpat-short",
        "hf_" + "x" * 34, "ghp_" + "0" * 36, "secret key: the one that opens every door in town",
        "the secret_key=" + "a" * 64,
    ],
)  # fmt: skip
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
        ("3782 822463 10005", "card number"),
        ("3714-496353-98431", "card number"),
        ("536-90-4399", "US social security number"),
        ("user.of.things@posteo.de", "e-mail address"),
        ("jane@mail.posteo.de", "e-mail address"),
    ],
)
def test_personal_data(text: str, what: str) -> None:
    ((found, shown),) = personal_data(f"It is {text}, call.")
    assert found == what
    assert text not in shown


@pytest.mark.parametrize(
    "text",
    ["you@example.com", "jane@mail.example.co.uk", "your.name@gmail.com", "user@domain.com", "info@your-company.com",
     "git@github.com:a/b.git", "logo@2x.png", "a@b.local", "noreply@posteo.de", "555-555-0123", "(212) 555-0100",
     "123-45-6789", "000-12-3456", "666-12-3456", "912-12-3456", "536-00-4399", "536-90-0000", "1-536-90-4399",
     "4782 822463 10005", "me@example.com",
     "x@y.example", "@user", "4111 1111 1111 1112", "1234567890123456",
     "DE00 3704 0044 0532 0130 00",
     "3.1415926535897932", "2026-11-21 10:00", "1 000 000 000 000", "48/2 = <<48/2=24>>24 and 1234 + 5678 = 6912"],
)  # fmt: skip
def test_no_personal_data(text: str) -> None:
    assert list(personal_data(text)) == []


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI, I cannot say.",
        "I am just an AI and know nothing.",
        "I'm an AI language model trained by no one.",
        "Sorry. I’m unable to provide that.",
        "As a large language model I am not able to browse.",
        "I can’t assist you.",
        "Als KI-Sprachmodell weiß ich das nicht.",
        "As an AI language model",
        "As an AI language model, I have no body.",
        "I’m sorry, but I can’t help with that.",
        "N/A",
        " null ",
        "...",
    ],
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    ["As an aid to memory, write it down.", "He worked as an AI researcher.", "I am an aide to the mayor.",
     "As an air pilot, I fly.", "I'm sorry, but I can come tomorrow.", "I am an AI engineer from Rome.",
     "An AI language model predicts the next word.", "I'm unable to swim.", "As a language modeller, she counts words.",
     "Was als KI-Modellbahn gilt.", "I cannot assisted", "Has an AI, has a dog.", "Paris.",
     "I am sorry that it rains.", "No.", "x" * 400 + " as an AI language model",
     "It cannot fly."],
)  # fmt: skip
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
