"""The table of findings: a code that stays, how grave it is, a short reason, and what to do about it.

Rows that cannot be used keep the code of their complaint (`posttrain.data.codes`). An error makes a run pointless or
its numbers untrue; a warning may be meant; information is a guess, or a thing that was not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    severity: str
    reason: str
    fix: str


FIX = "posttrain data check FILE --fix OUT drops them"
SEE = "posttrain data tokens FILE --model M --rows N shows one"
KINDS: dict[str, Kind] = {
    "E-DATA-0060": Kind("error", "chosen equals rejected", FIX),
    "E-DATA-0061": Kind("error", "rows of the validation data", "take them out of one of the two, or split anew"),
    "E-DATA-0062": Kind("error", "rated both good and bad", "keep one rating of each answer"),
    "E-DATA-0063": Kind("error", "all ratings alike", "KTO needs good and bad answers; to train on all, use SFT"),
    "E-DATA-0064": Kind("error", "data for several methods", "put them into a file each"),
    "E-DATA-0065": Kind(
        "error", "ratings that are none", "rate these rows (true, false) or drop them: KTO refuses them"
    ),
    "W-DATA-0101": Kind("warning", "exact duplicates", FIX),
    "W-DATA-0102": Kind("warning", "near duplicates", "look at the pairs; drop what says the same twice"),
    "W-DATA-0103": Kind(
        "warning",
        "nearly rows of the validation data",
        "take them out of one of the two; posttrain data split --near keeps them together",
    ),
    "W-DATA-0104": Kind(
        "warning", "same prompt, another answer", "decide which answer is right, or keep all on purpose"
    ),
    "W-DATA-0105": Kind("warning", "pairs that say the opposite", "decide which of the two answers is the better one"),
    "W-DATA-0106": Kind("warning", "prompts of the validation data", "split by prompt, so that no prompt is in both"),
    "W-DATA-0107": Kind("warning", "longer than max_length", "raise --max-length, shorten the rows or split them"),
    "W-DATA-0108": Kind("warning", "refusals and boilerplate", "drop what the model is not to learn"),
    "W-DATA-0109": Kind("warning", "one answer again and again", "keep as many as the model is to give"),
    "W-DATA-0110": Kind(
        "warning", "chosen is the longer one", "add pairs whose better answer is short, or expect length"
    ),
    "W-DATA-0111": Kind("warning", "ratings out of balance", "weigh them: desirable_weight, undesirable_weight"),
    "W-DATA-0112": Kind("warning", "control characters", "posttrain data check FILE --fix OUT takes them out"),
    "W-DATA-0113": Kind("warning", "bidirectional control characters", "see whether the text reads as it is written"),
    "W-DATA-0114": Kind("warning", "hints of secrets", "revoke them if they are real, and take them out"),
    "W-DATA-0115": Kind("warning", "hints of personal data", "take them out, or make sure that you may train on them"),
    "W-DATA-0116": Kind("info", "answer in another language than the prompt", "fine for translation, else drop them"),
    "W-DATA-0117": Kind("info", "rows in another language", "fine if it is meant"),
    "W-DATA-0118": Kind("warning", "several formats", "fine if it is meant; --format NAME refuses all others"),
    "W-DATA-0119": Kind("info", "not looked for", "see the sentence"),
    "W-DATA-0120": Kind("warning", "chosen and rejected differ in form only", "fine if form is to be learnt"),
    "W-DATA-0121": Kind("warning", "no token to stop at", "--chat-template NAME gives one whose turns end"),
    "W-DATA-0122": Kind("warning", "tokens that straddle the answer's beginning", "end prompts before a space"),
    "W-DATA-0123": Kind("info", "another text in use than in training", SEE),
    "W-DATA-0124": Kind("warning", "thoughts left out by the template", SEE),
    "W-DATA-0125": Kind("warning", "tools left out by the template", "--chat-template NAME of one that knows tools"),
    "W-DATA-0126": Kind("warning", "special tokens in the text", "take them out where they are not meant"),
    "W-DATA-0127": Kind("info", "no beginning-of-sequence token", "fine if the model was trained without"),
    "W-DATA-0128": Kind("warning", "markers that are no tokens", "choose a template whose markers the tokenizer has"),
    "W-DATA-0129": Kind(
        "warning", "odd system turns", "one system turn, the first; posttrain data tokens shows the row"
    ),
    "W-DATA-0130": Kind(
        "warning", "arguments of calls in quotes", "write them as objects, or --chat-template NAME of one of ours"
    ),
    "W-DATA-0131": Kind(
        "warning", "columns without a place", "write them where the format looks for them, or leave them out"
    ),
    "W-DATA-0132": Kind(
        "warning", "several formats in one row", "--format NAME says which is meant; fine if it is the one read"
    ),
    "W-DATA-0150": Kind("warning", "tokens of turns in an answer", "take them out of the text; " + SEE),
    "W-DATA-0151": Kind("info", "marks of turns in the text", "take them out where they are not meant; " + SEE),
    "W-DATA-0152": Kind("info", "messages as JSON in a text", "fine if all rows have it; lists need no quotes"),
    "W-DATA-0153": Kind(
        "warning",
        "messages trained as text",
        "write prompt and answers all as messages; fine if the model is to write JSON",
    ),
    "W-DATA-0154": Kind(
        "warning", "tokens cut by a train flag", "let ranges hold whole words, each with the space before it; " + SEE
    ),
    "W-DATA-0155": Kind("warning", "others' words trained in a text", "make `messages` of them"),
    "W-DATA-0156": Kind("info", "conversations in one text", "make `messages` of them, if the model is to chat"),
    "W-DATA-0157": Kind("warning", "answers that repeat the prompt", "leave it out of the answers, or out of `prompt`"),
    "W-DATA-0158": Kind("warning", "turns that say nothing", "leave such turns out, or drop the rows"),
    "W-DATA-0159": Kind("warning", "arguments that the template does not know", "see how the template spells them"),
    "W-DATA-0161": Kind(
        "warning", "pairs of different questions", "let them part with the assistant's answer, or drop them"
    ),
    "W-DATA-0162": Kind("warning", "margins on some pairs only", "write one on every row (0 for none), or on no row"),
    "W-DATA-0160": Kind("warning", "thoughts where thinking is off", "leave the thoughts out, or the switch; " + SEE),
    "W-DATA-0135": Kind(
        "warning", "validation rows that go on from trained ones", "split anew with posttrain data split"
    ),
    "W-DATA-0145": Kind(
        "warning", "validation rows that begin as trained ones", "split anew with posttrain data split"
    ),
}
