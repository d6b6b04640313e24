"""Rows compared by their hashes: duplicates, contradictions, and what the validation data have in common with them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.tally import NO_LABEL, Tally
from posttrain.data.report import number

NUM_FIRST = 5
GREETED_ROWS, GREETED_SHARE = 10, 0.05
"""What more rows begin with, in number and as a share, is a greeting."""
ODD = np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
"""Odd constants, so that hashes in another order make another sum."""


def within(tally: Tally, settings: DoctorSettings) -> Iterator[Finding]:
    """What the rows of one data set say about one another."""
    yield from _duplicates(tally)
    yield from _contradictions(tally)
    yield from _turned_round(tally)
    yield from _repeated(tally, settings)


def across(train: Tally, validation: Tally) -> Iterator[Finding]:
    """What training data give away of the validation data. A turn before the answer counts as the answer of a row of
    its own: a conversation that goes on is trained on from its beginning."""
    trained, held_out, turns = _exchanges(train), _exchanges(validation), _earlier(train)
    same = np.isin(validation.array("row"), train.array("row"))
    same |= np.isin(held_out, turns[1]) & _is_plain(validation)
    if same.any():
        part = share(same.sum(), len(same))
        sentence = f"{rows(int(same.sum()))} of the validation data ({part}) trained on as well: its loss will flatter"
        yield _about("E-DATA-0061", validation, same, sentence)
    prompts = validation.array("prompt")
    asked = np.concatenate([train.array("prompt"), train.array("earlier_prompt")])
    leaked = np.isin(prompts, asked) & (prompts != 0) & ~same
    if leaked.any():
        sentence = (
            f"{rows(int(leaked.sum()))} of the validation data with a prompt that is trained on, answered otherwise"
        )
        yield _about("W-DATA-0106", validation, leaked, sentence)
    row, told = _earlier(validation)
    continued = np.isin(np.arange(validation.used), row[np.isin(told, trained[_is_plain(train)])]) & ~same
    if continued.any():
        sentence = f"{rows(int(continued.sum()))} of the validation data in continuation of a row that is trained on"
        yield _about("W-DATA-0135", validation, continued, sentence)
    known = turns[1][~is_greeting(np.concatenate([turns[1], told]), train.used + validation.used)[: len(turns[1])]]
    forked = np.isin(np.arange(validation.used), row[np.isin(told, known)]) & ~(same | leaked | continued)
    if forked.any():
        sentence = f"{rows(int(forked.sum()), 'begin')} in the validation data as a conversation that is trained on"
        yield _about("W-DATA-0145", validation, forked, sentence)


def is_greeting(exchanges: np.ndarray, num_rows: int) -> np.ndarray:
    """Of each exchange (with all before it) whether so many of the rows begin with it that it ties none of them
    together: what comes after decides."""
    _, inverse, counts = np.unique(exchanges, return_inverse=True, return_counts=True)
    return np.asarray((counts > max(GREETED_ROWS, GREETED_SHARE * num_rows))[inverse.reshape(-1)])


def _exchanges(tally: Tally) -> np.ndarray:
    """A hash of each row's prompt with its answer, whatever its label."""
    return tally.array("prompt") * ODD[0] + tally.array("answer")


def _earlier(tally: Tally) -> tuple[np.ndarray, np.ndarray]:
    """The same of each turn before the answer that is trained, and the index of the row that it stands in. Of pairs and
    ratings only the answers are trained."""
    row = np.repeat(np.arange(tally.used), tally.array("earlier"))
    told = tally.array("earlier_prompt") * ODD[0] + tally.array("earlier_answer")
    is_trained = _is_plain(tally)[row]
    return row[is_trained], told[is_trained]


def _is_plain(tally: Tally) -> np.ndarray:
    """Of each row whether it is no pair and no rating."""
    return (tally.array("rejected") == 0) & (tally.array("label") == NO_LABEL)


def repeats(hashes: np.ndarray) -> np.ndarray:
    """Of each entry, whether it stood before."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(hashes), dtype=bool)
    again[order[1:]] = ordered[1:] == ordered[:-1]
    return again


def _duplicates(tally: Tally) -> Iterator[Finding]:
    again = repeats(tally.array("row"))
    if again.any():
        sentence = f"{rows(int(again.sum()), 'say')} the same as an earlier one ({share(again.sum(), len(again))})"
        yield _about("W-DATA-0101", tally, again, sentence)


def _contradictions(tally: Tally) -> Iterator[Finding]:
    """Of prompts with one answer each. Several pairs to a prompt are usual; ratings contradict by their label."""
    prompt, answer, label = tally.array("prompt"), tally.array("answer"), tally.array("label")
    both = _exchanges(tally)
    rated = label != NO_LABEL
    opposite = rated & _differ(both, label.astype(np.uint64), rated)
    if opposite.any():
        sentence = f"{rows(int(opposite.sum()))} rate the same answer to the same prompt both good and bad"
        yield _about("E-DATA-0062", tally, opposite, sentence)
    plain = _is_plain(tally) & (prompt != 0)
    other = _differ(prompt, answer, plain)
    if other.any():
        num_prompts = len(np.unique(prompt[other]))
        prompts = "one prompt" if num_prompts == 1 else f"{number(num_prompts)} prompts"
        sentence = f"{rows(int(other.sum()))} answer {prompts} in different ways"
        yield _about("W-DATA-0104", tally, other, sentence, {"prompts": num_prompts})


def _differ(key: np.ndarray, value: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of each asked-for entry, whether another one has the same key and another value."""
    chosen = np.flatnonzero(asked)
    order = chosen[np.lexsort((value[chosen], key[chosen]))]
    keys, values = key[order], value[order]
    parted = keys[1:][(keys[1:] == keys[:-1]) & (values[1:] != values[:-1])]
    return asked & np.isin(key, parted)


def _turned_round(tally: Tally) -> Iterator[Finding]:
    prompt, chosen, rejected = (tally.array(name) for name in ("prompt", "answer", "rejected"))
    pairs = (rejected != 0) & (chosen != rejected)
    if not pairs.any():
        return
    forth = prompt * ODD[0] + chosen * ODD[1] + rejected
    back = prompt * ODD[0] + rejected * ODD[1] + chosen
    turned = pairs & np.isin(back, forth[pairs])
    if turned.any():
        sentence = f"{rows(int(turned.sum()))} prefer an answer that another row rejects for the same other one"
        yield _about("W-DATA-0105", tally, turned, sentence)


def _repeated(tally: Tally, settings: DoctorSettings) -> Iterator[Finding]:
    answers = tally.array("answer")
    if len(answers) < settings.min_rows:
        return
    long_enough = tally.array("answer_length") >= settings.repeated_answer_characters
    values, counts = np.unique(answers[long_enough], return_counts=True)
    least = max(settings.repeated_answer_rows, settings.repeated_answer_share * len(answers))
    often = np.isin(answers, values[counts >= least]) & long_enough
    if often.any():
        most = int(counts.max())
        sentence = f"one answer stands in {rows(most)} ({share(most, len(answers))})"
        yield _about("W-DATA-0109", tally, often, sentence)


def _about(code: str, tally: Tally, which: np.ndarray, sentence: str, details: dict[str, int] | None = None) -> Finding:
    first = [tally.origin(int(index)) for index in np.flatnonzero(which)[:NUM_FIRST]]
    return finding(code, int(which.sum()), first, sentence, details=details)
