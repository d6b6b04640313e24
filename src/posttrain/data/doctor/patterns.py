"""What in a text deserves a second look: control characters, secrets, personal data, refusals. Hints, not proof.

A million rows are to be read in a minute, so every pattern has a cheap test before it: a substring that it cannot be
without. What is found is shown redacted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff]")
"""No text needs them: C0 and C1 controls but tab and line ends, zero-width space, byte order mark."""
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Embeddings, overrides and isolates: they can make text read otherwise than it is stored (CVE-2021-42574)."""

# A substring that has to be there, what it is, the pattern.
SECRETS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("PRIVATE KEY", "private key", re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----")),
    ("AKIA", "AWS key", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("gh", "GitHub token", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})")),
    ("sk-", "API key", re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")),
    ("xox", "Slack token", re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}")),
    ("hf_", "Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}")),
    ("AIza", "Google key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}")),
    ("_live_", "Stripe key", re.compile(r"\b[rs]k_live_[0-9A-Za-z]{20,}")),
    ("eyJ", "JSON web token", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
)
EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
EXAMPLE = re.compile(r"@(.*\.)?(example\.(com|org|net)|.*\.(example|test|invalid|localhost))$", re.IGNORECASE)
"""Reserved for examples (RFC 2606)."""
DIGITS = re.compile(r"\d\d[\d ()./-]{5,}\d\d")
"""No number of a person or an account is shorter."""
PHONE = re.compile(
    r"(?<![\w+])(\+\d{1,3}[ ()./-]{0,2}\d(?:[ ()./-]{0,2}\d){7,12}|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4})(?![\w-])"
)
CARD = re.compile(r"(?<![\d.])[3-6]\d{3}[ -]?(?:\d{4}[ -]?\d{4}[ -]?\d{4}|\d{6}[ -]?\d{5})(?!\d|\.\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")

REFUSALS = (
    "as an ai", "as a language model", "as a large language model", "i'm an ai", "i am an ai", "ai language model",
    "i cannot fulfill", "i can't fulfill", "i cannot assist", "i can't assist", "i can't help with that",
    "i cannot help with that", "i'm sorry, but i can", "i am sorry, but i can", "i'm unable to", "i am unable to",
    "my knowledge cutoff", "als ki-sprachmodell", "als ki-modell", "en tant que modèle de langage",
    "como modelo de lenguaje",
)  # fmt: skip
BOILERPLATE = frozenset(
    ("n/a", "na", "none", "null", "nan", "todo", "tbd", "...", "…", "-", "?", "lorem ipsum", "[deleted]", "[removed]",
     "<noinput>", "no answer", "undefined")
)  # fmt: skip
REFUSAL = re.compile("|".join(map(re.escape, REFUSALS)))
REFUSAL_WORDS = ("ai", "AI", "sorry", "cannot", "can't", "unable", "model", "cutoff", "KI")
BEGINNING = 300
"""Refusals are said at once; further on the words are usually quoted."""


def secrets(text: str) -> Iterator[tuple[str, str]]:
    """What each seems to be, and how it is shown."""
    for needle, what, pattern in SECRETS:
        if needle in text:
            for match in pattern.finditer(text):
                yield what, redacted(match.group())


def personal_data(text: str) -> Iterator[tuple[str, str]]:
    if "@" in text:
        for match in EMAIL.finditer(text):
            if not EXAMPLE.search(match.group()):
                yield "e-mail address", redacted(match.group())
    if not DIGITS.search(text):
        return
    for match in IBAN.finditer(text):
        if is_iban(match.group()):
            yield "IBAN", redacted(match.group())
    for match in CARD.finditer(text):
        if has_luhn_sum(match.group()):
            yield "card number", redacted(match.group())
    for match in PHONE.finditer(text):
        yield "phone number", redacted(match.group())


def is_refusal(answer: str) -> bool:
    """An answer that only says that there will be none, or that stands for one."""
    start = answer[:BEGINNING]
    if len(answer) < 16 and answer.strip().lower() in BOILERPLATE:
        return True
    if not any(word in start for word in REFUSAL_WORDS):
        return False
    return REFUSAL.search(start.lower().replace("’", "'")) is not None


def redacted(text: str) -> str:
    """The first characters, and how many there are."""
    return f"{text[: 2 if len(text) < 20 else 4]}… ({len(text)} characters)"


def has_luhn_sum(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [
        digit if i % 2 == 0 else (digit * 2 - 9 if digit > 4 else digit * 2) for i, digit in enumerate(digits[::-1])
    ]
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """ISO 13616: moved round and with letters as numbers, it leaves 1 of 97."""
    compact = text.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1
