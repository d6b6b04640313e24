"""Near duplicates: rows that share most of their words in order. Exact duplicates are not among them.

Sets of a few words in a row are compared, in lower case and without punctuation. The similarity is an estimate. Of
large data only the tally's sample is looked at, and the finding says so: a sample of one row in ten holds one pair in a
hundred.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.sketches import Sketches, shingles
from posttrain.data.doctor.tally import NO_LABEL, Tally
from posttrain.data.report import number

NUM_FIRST = 5


def near(train: Tally, validation: Tally | None, settings: DoctorSettings) -> Iterator[Finding]:
    """Near duplicates within `train`, and rows of `validation` that are nearly in it."""
    if settings.near_rows == 0:
        sentence = "near duplicates were not looked for (near_rows=0)"
        yield finding("W-DATA-0119", 0, [], sentence, f"--near {DoctorSettings.near_rows}")
        return
    try:
        sketches = Sketches(settings)
    except ImportError:
        sentence = "near duplicates were not looked for: datasketch is not installed"
        yield finding("W-DATA-0119", 0, [], sentence, "pip install 'posttrain[data]'")
        return
    if note := _partly(train, settings):
        yield note
    sampled = distinct(train)
    made = sketches.of(_shingled(sampled, settings))
    alike = sketches.earlier(made)
    if found := [(sampled[i][0], sampled[alike[i]][0]) for i in np.flatnonzero(alike >= 0)]:
        sentence = (
            f"{rows(len(found), 'are')} nearly an earlier one ({share(len(found), len(sampled))} of those looked at)"
        )
        yield _pairs("W-DATA-0102", found, train, train, sentence)
    if validation is None:
        return
    trained, hashes = set(train.array("row").tolist()), validation.array("row")
    others = [(row, text) for row, text in distinct(validation) if int(hashes[row]) not in trained]
    both = np.concatenate([made, sketches.of(_shingled(others, settings))])
    alike = sketches.earlier(both, known=len(made))[len(made) :]
    if leaked := [(others[i][0], sampled[alike[i]][0]) for i in np.flatnonzero(alike >= 0)]:
        sentence = f"{rows(len(leaked))} of the validation data nearly as in a row that is trained on"
        yield _pairs("W-DATA-0103", leaked, validation, train, sentence)


def _pairs(code: str, found: list[tuple[int, int]], of: Tally, to: Tally, sentence: str) -> Finding:
    first = [of.origin(row) for row, _ in found[:NUM_FIRST]]
    pairs = [f"{of.origin(row)} ~ {to.origin(other)}" for row, other in found[:NUM_FIRST]]
    return finding(code, len(found), first, sentence, details={"pairs": pairs})


def _partly(tally: Tally, settings: DoctorSettings) -> Finding | None:
    if tally.used <= settings.near_rows:
        return None
    sentence = (
        f"near duplicates were looked for among {number(settings.near_rows)} rows drawn from {number(tally.used)}: "
        "few of the pairs are seen"
    )
    return finding("W-DATA-0119", tally.used - settings.near_rows, [], sentence, "--near all looks at all of them")


def distinct(tally: Tally) -> list[tuple[int, str]]:
    """The sampled rows in order, the first of each set of exact duplicates. Ratings of one answer are one row: where
    they differ they contradict one another (E-DATA-0062), which is not to be said twice."""
    row, prompt, answer, label = (tally.array(name) for name in ("row", "prompt", "answer", "label"))
    first: dict[tuple[int, ...], tuple[int, str]] = {}
    for _, at, text in sorted(tally.sample, key=lambda item: item[1]):
        key = (int(row[at]),) if label[at] == NO_LABEL else (int(prompt[at]), int(answer[at]))
        first.setdefault(key, (at, text))
    return list(first.values())


def _shingled(texts: list[tuple[int, str]], settings: DoctorSettings) -> Iterator[list[bytes]]:
    return (shingles(text, settings.near_words) for _, text in texts)
