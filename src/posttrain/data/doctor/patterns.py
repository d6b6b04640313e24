"""What in a text deserves a second look: control characters, secrets, personal data, refusals. Hints, not proof.

A million rows are to be read in a minute, so every pattern has a cheap test before it: a substring that it cannot be
without. What is found is shown redacted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff]")
"""No text needs them: C0 and C1 controls but tab and line ends, zero-width space, byte order mark."""
ESCAPE = re.compile(
    "\x1b(?:"
    "\\[[0-?]*[ -/]*[@-~]"  # CSI: colours, the cursor
    "|[]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\\\)"  # OSC and such: titles, the address of a link
    "|[()*+][0-9A-Za-z]|[78=>c])"
)
"""What terminals take for orders (ECMA-48), whole: without its first character the rest would stand in the text."""
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Embeddings, overrides and isolates: they can make text read otherwise than it is stored (CVE-2021-42574)."""

AWS_SECRET = re.compile(
    r"""(?i)(?<![a-z])(?:aws_?)?secret_?(?:access_?)?key["']?\s*[:=]\s*["']?[a-z0-9/+]{40}(?![\w/+=])"""
)
PLACEHOLDER = re.compile(r"x{4}|\*{3}|0{8}|example|placeholder|redacted|changeme|your", re.IGNORECASE)
"""What stands for a secret, in documents about them."""

# A substring that has to be there, what it is, the pattern.
SECRETS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("PRIVATE KEY", "private key", re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY( BLOCK)?-----")),
    ("AKIA", "AWS key", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("ASIA", "AWS key", re.compile(r"\bASIA[0-9A-Z]{16}\b")),
    ("ecret", "AWS secret key", AWS_SECRET),
    ("SECRET", "AWS secret key", AWS_SECRET),
    ("gh", "GitHub token", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})")),
    ("glpat-", "GitLab token", re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}")),
    ("sk-", "API key", re.compile(r"(?<![\w-])sk-(?=[\w-]{20})[\w-]*?[A-Za-z0-9]{16}[\w-]*")),
    ("xox", "Slack token", re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}")),
    ("hf_", "Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}")),
    ("AIza", "Google key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}")),
    ("_live_", "Stripe key", re.compile(r"\b[rs]k_live_[0-9A-Za-z]{20,}")),
    ("eyJ", "JSON web token", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
)
EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
EXAMPLE = re.compile(
    r"@(.*\.)?(example\.[a-z.]+|.*\.(example|test|invalid|localhost|local|tld))$"  # RFC 2606, and what is used like it
    r"|^(you|your[._-]?(name|e-?mail)|me|user|username|name|someone|somebody|e-?mail|foo|bar|test|git|no-?reply)@"
    r"|@(your|my|the)?[_-]?(domain|company|email|mail|site|website|server|host)\.(com|org|net)$"
    r"|\.(png|jpe?g|gif|webp|svg|ico|js|ts|css|py|json|html?)$",  # `logo@2x.png`
    re.IGNORECASE,
)
"""What is written like an address and is nobody's."""
DIGITS = re.compile(r"\d\d[\d ()./-]{5,}\d\d")
"""No number of a person or an account is shorter."""
PHONE = re.compile(
    r"(?<![\w+])(\+\d{1,3}[ ()./-]{0,2}\d(?:[ ()./-]{0,2}\d){7,12}|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4})(?![\w-])"
)
FICTION = re.compile(r"555\D?01\d\d$")
"""Numbers that are given to nobody, for films."""
CARD = re.compile(r"(?<![\d.])(?:[3-6]\d{3}[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}|3[47]\d\d[ -]?\d{6}[ -]?\d{5})(?!\d|\.\d)")
SSN = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
NO_SSN = ("123-45-6789", "078-05-1120", "219-09-9999")
"""Of forms and advertisements."""
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")

AN_AI = r"(?:an? (?:large )?(?:ai|artificial intelligence|language model)(?: (?:language )?model| assistant| chatbot)?)"
GOES_ON = r"(?=[,.;:!]| (?:i|my|it|and|so|but|that|trained|developed|created|without)\b|$)"
"""And not: an AI researcher."""
HELP = "help|assist|fulfil|fulfill|comply|provide|answer|generate|create|discuss|access|browse|continue|complete|share"
REFUSALS = (
    rf"as {AN_AI}{GOES_ON}", rf"i(?:'m| am) (?:just |only |merely )?{AN_AI}{GOES_ON}",
    r"i can(?:not|'t) (?:fulfill?|assist|comply)", r"i can(?:not|'t) help (?:you )?with (?:that|this)",
    r"i(?:'m| am) sorry, but i can(?:not|'t)", rf"i(?:'m| am) (?:unable|not able) to (?:{HELP})",
    r"my knowledge cut-?off", r"als ki-(?:sprach)?modell", r"en tant que modèle de langage",
    r"como modelo de lenguaje",
)  # fmt: skip
BOILERPLATE = frozenset(
    ("n/a", "na", "none", "null", "nan", "todo", "tbd", "...", "…", "-", "?", "lorem ipsum", "[deleted]", "[removed]",
     "<noinput>", "no answer", "undefined")
)  # fmt: skip
REFUSAL = re.compile(rf"\b(?:{'|'.join(REFUSALS)})(?!\w)")
REFUSAL_WORDS = (
    "ai",
    "AI",
    "sorry",
    "cannot",
    "can't",
    "can’t",
    "able",
    "model",
    "cutoff",
    "cut-off",
    "KI",
    "rtificial",
)
BEGINNING = 300
"""Refusals are said at once; further on the words are usually quoted."""


def secrets(text: str) -> Iterator[tuple[str, str]]:
    """What each seems to be, and how it is shown."""
    for needle, what, pattern in SECRETS:
        if needle in text:
            for match in pattern.finditer(text):
                if not PLACEHOLDER.search(match.group()):
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
    for match in SSN.finditer(text):
        if match.group() not in NO_SSN:
            yield "US social security number", redacted(match.group())
    for match in PHONE.finditer(text):
        if not FICTION.search(match.group()):
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
