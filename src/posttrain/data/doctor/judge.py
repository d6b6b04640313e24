"""From a tally to findings: what was marked in single rows, and the shares that only the whole can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from posttrain.data.codes import REASONS
from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.tally import NO_LABEL, Tally
from posttrain.data.report import number

MARKS = {
    "E-DATA-0060": ("reject", "the very answer that is chosen: there is nothing to learn from that"),
    "W-DATA-0120": ("reject", "an answer that differs from the chosen one in white space, case or punctuation only"),
    "W-DATA-0108": ("are", "answered by a refusal or by words that stand for none ({share})"),
    "W-DATA-0112": ("hold", "control characters"),
    "W-DATA-0113": ("hold", "characters that change the direction of writing unseen"),
    "W-DATA-0114": ("hold", "what looks like a secret ({kinds})"),
    "W-DATA-0115": ("hold", "what looks like personal data ({kinds})"),
    "W-DATA-0116": ("seem", "to answer in another language than the question's ({kinds}), by frequent words"),
    "W-DATA-0131": ("have", "what their format has no place for, so that nothing is made of it ({kinds})"),
    "W-DATA-0132": ("hold", "another format beside the one that is read ({kinds})"),
    "W-DATA-0152": ("hold", "messages as JSON in a text ({share}), read as the messages that it stands for"),
    "W-DATA-0153": ("hold", "messages written into a text, which is trained as the text that it is"),
    "W-DATA-0155": ("are", "conversations in one text (Human: ... Assistant: ...): what others say is trained as well"),
    "W-DATA-0156": ("hold", "conversations in one text (Human: ... Assistant: ...), which no chat template writes"),
    "W-DATA-0157": ("have", "an answer that begins with its whole prompt, which then stands there twice"),
    "W-DATA-0158": ("hold", "turns of a user or the system that say nothing"),
    "W-DATA-0161": ("compare", "answers to different questions: they part with a turn of the user's or the system's"),
    "W-DATA-0129": ("have", "several system turns, or one that does not come first: few templates know what to do"),
}


def judge(tally: Tally, settings: DoctorSettings, on_bad_row: str) -> Iterator[Finding]:
    yield from unread(tally)
    yield from _bad_rows(tally, on_bad_row)
    yield from _formats(tally)
    yield from _marks(tally)
    yield from _unrated(tally)
    yield from _margins(tally)
    yield from _labels(tally, settings)
    yield from _length_bias(tally, settings)
    yield from _languages(tally, settings)


def unread(tally: Tally, detail: str = "unread") -> Iterator[Finding]:
    """An error under any policy: what was not read was not looked at either. `detail` says of which data."""
    for stop in tally.unread:
        sentence = f"nothing can be read from here on: {REASONS.get(stop.code, 'unusable')}"
        fix = stop.hint or "mend this place first"
        shown = stop.message.splitlines()
        yield Finding(stop.code, "error", 1, (stop.where,), sentence, fix, {"shown": shown, detail: True})


def _bad_rows(tally: Tally, on_bad_row: str) -> Iterator[Finding]:
    """What makes rows unusable, under its own code. Where such rows are to be skipped it is no more than a warning."""
    severity = "warning" if on_bad_row == "skip" else "error"
    for code, cases in sorted(tally.bad.items()):
        seen = next((bad for bad in tally.bad_rows if bad.code == code), None)
        reason = REASONS.get(code, "unusable")
        fix = (seen.hint if seen else None) or "posttrain data check FILE --fix OUT drops them"
        sentence = f"{rows(cases.count)} cannot be used: {reason}"
        yield Finding(code, severity, cases.count, tuple(map(str, cases.first)), sentence, fix)


def _formats(tally: Tally) -> Iterator[Finding]:
    counts = {name: cases.count for name, cases in tally.methods.items()}
    if "rated" in counts:  # broken ratings are a finding of their own
        counts["sft"] = counts.get("sft", 0) - tally.unrated.count
    counts = {name: count for name, count in counts.items() if count > 0}
    if len(counts) > 1:
        rarest = min(counts, key=lambda name: counts[name])
        names = {"sft": "supervised training", "preference": "preference training", "rated": "KTO"}
        parts = ", ".join(f"{number(count)} for {names[name]}" for name, count in counts.items())
        first = tally.methods[rarest].first
        yield finding("E-DATA-0064", counts[rarest], first, f"rows are for several methods: {parts}")
    elif len(tally.formats) > 1 and len(tally.methods) == 1:
        parts = "; ".join(f"{number(count)} {name}" for name, count in tally.formats.most_common(4))
        count = tally.used - tally.formats.most_common(1)[0][1]
        yield finding("W-DATA-0118", count, [], f"rows have several formats: {parts}")


def _marks(tally: Tally) -> Iterator[Finding]:
    for code, (verb, sentence) in MARKS.items():
        if code not in tally.marks:
            continue
        cases, kinds = tally.marks[code], tally.kinds.get(code, Counter[str]())
        most = sorted(kinds.items(), key=lambda item: -item[1])[:4]
        named = ", ".join(f"{what} {number(count)}" for what, count in most)
        said = sentence.format(share=share(cases.count, tally.used), kinds=named)
        shown = tally.shown.get(code)
        yield finding(
            code,
            cases.count,
            cases.first,
            f"{rows(cases.count, verb)} {said}",
            details={"shown": shown} if shown else None,
        )


def _margins(tally: Tally) -> Iterator[Finding]:
    """A reward model is not trained on such a file; other methods heed no margin."""
    cases = tally.without_margin
    if pairs := tally.methods.get("preference"):
        having = pairs.count - cases.count
        if cases.count and having:
            sentence = f"{rows(cases.count, 'have')} no `margin`, and {number(having)} have one"
            yield finding("W-DATA-0162", cases.count, cases.first, sentence)


def _unrated(tally: Tally) -> Iterator[Finding]:
    """Where others are rated, a null or another word says that a rating was lost; elsewhere such a column is the user's
    own."""
    cases = tally.unrated
    if cases.count and "rated" in tally.methods:
        about = "a `label` that is null, or no rating, among rated ones: read as plain examples"
        sentence = f"{rows(cases.count, 'have')} {about}"
        yield finding("E-DATA-0065", cases.count, cases.first, sentence)


def _labels(tally: Tally, settings: DoctorSettings) -> Iterator[Finding]:
    labels = tally.array("label")
    rated, good = int((labels != NO_LABEL).sum()), int((labels == 1).sum())
    if rated < 2:
        return
    counts = {"good": good, "bad": rated - good}
    word, most = max(counts.items(), key=lambda item: item[1])
    if most == rated:
        yield finding("E-DATA-0063", most, [], f"all {number(rated)} ratings say {word}", details=counts)
    elif rated >= settings.min_rows and most > settings.label_share * rated:
        yield finding(
            "W-DATA-0111", most, [], f"{share(most, rated)} of {number(rated)} ratings say {word}", details=counts
        )


def _length_bias(tally: Tally, settings: DoctorSettings) -> Iterator[Finding]:
    chosen, rejected = tally.array("answer_length"), tally.array("rejected_length")
    parted = (rejected >= 0) & (chosen != rejected)
    pairs = int(parted.sum())
    if pairs < settings.min_rows:
        return
    longer = int((chosen > rejected)[parted].sum())
    if longer > settings.longer_share * pairs:
        means = [float(lengths[parted].mean()) for lengths in (chosen, rejected)]
        sentence = (
            f"in {share(longer, pairs)} of {number(pairs)} pairs the chosen answer is the longer one (on average "
            f"{means[0]:.0f} characters against {means[1]:.0f}): a model may learn length instead of quality"
        )
        yield finding("W-DATA-0110", longer, [], sentence)


def _languages(tally: Tally, settings: DoctorSettings) -> Iterator[Finding]:
    total = sum(cases.count for cases in tally.languages.values())
    if total < settings.min_rows or len(tally.languages) < 2:
        return
    main = max(tally.languages, key=lambda name: tally.languages[name].count)
    others = {name: cases for name, cases in tally.languages.items() if name != main}
    count = sum(cases.count for cases in others.values())
    if count <= settings.other_language_share * total:
        parts = ", ".join(f"{name} {number(cases.count)}" for name, cases in sorted(others.items()))
        first = next(iter(others.values())).first
        sentence = (
            f"{rows(count, 'seem')} to be in another language than {main} ({parts}), by script and frequent words"
        )
        yield finding("W-DATA-0117", count, first, sentence)
