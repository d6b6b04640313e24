"""Which language a text seems to be in: by its script, and where that is Latin by the most frequent words of ten
languages. A light guess, right for prose of some length and silent (None) about code, lists and short texts; for more,
use a language identifier such as fastText's.
"""

from __future__ import annotations

import re

STOP_WORDS: dict[str, str] = {
    "en": "the of and to is that it for you with on are this be have from or an what was your not which can would",
    "de": "der die und das ist nicht ein eine zu den mit sich auf für von dem im auch wie ich sie wird werden oder es",
    "fr": "le la les et des est une un pour que dans qui pas sur vous avec ce du au ne il sont plus par cette",
    "es": "el la los y las es una un para que en con por del se no su más como lo al está son pero muy",
    "it": "il la di che è e un una per non con del della sono le si i gli come più nel alla anche questo dei",
    "pt": "o a os e as é uma um para que em com por do da não se mais como dos ao são mas você na no",
    "nl": "de het een en van is dat niet op te voor met zijn aan ook er om maar als bij wordt naar deze ik",
    "pl": "nie się na jest że do to jak ale po dla co tak przez od czy są które być ich oraz może tylko który",
    "sv": "och att det som en är för på med av den till inte har de ett om var jag men så kan från eller ska",
    "tr": "ve bir bu için ile da de çok ne olarak daha gibi en var olan ama o kadar sonra mi değil ya her ben",
}
OF_WORD: dict[str, tuple[str, ...]] = {
    word: tuple(language for language, words in STOP_WORDS.items() if word in words.split())
    for words in STOP_WORDS.values()
    for word in words.split()
}
KNOWN = frozenset(OF_WORD)
SCRIPTS: dict[str, re.Pattern[str]] = {
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Chinese": re.compile("[\u4e00-\u9fff]"),
    "Korean": re.compile("[\uac00-\ud7af]"),
    "Cyrillic": re.compile("[\u0400-\u04ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
}
BEYOND_LATIN = re.compile("[\u0370-\ud7ff]")
LENGTH = 400
"""Characters that are looked at."""
SHARE = 0.2
"""A script that so many of the characters are in is the text's."""


def language(text: str, min_words: int = 4) -> str | None:
    """`en`, `de`, ... or the name of a script; None where too little speaks for any. At least `min_words` different
    frequent words, and half as many again as of any other language."""
    start = text[:LENGTH]
    if not start.isascii() and BEYOND_LATIN.search(start):
        for name, pattern in SCRIPTS.items():
            if len(pattern.findall(start)) > SHARE * len(start):
                return name
    found = KNOWN.intersection(start.lower().split())
    if len(found) < min_words:
        return None
    votes: dict[str, int] = {}
    for word in found:
        for name in OF_WORD[word]:
            votes[name] = votes.get(name, 0) + 1
    best = max(votes, key=lambda name: votes[name])
    second = max((count for name, count in votes.items() if name != best), default=0)
    return best if votes[best] >= min_words and votes[best] >= 1.5 * second else None
