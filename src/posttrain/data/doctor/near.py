"""Near duplicates: rows that share most of their words in order, found by MinHash and locality-sensitive hashing
(Broder 1997; `datasketch`). Exact duplicates are not among them.

Sets of a few words in a row are compared, in lower case and without punctuation. The similarity is an estimate. Of
large data only the tally's sample is looked at, and the finding says so: a sample of one row in ten holds one pair in a
hundred.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from zlib import crc32

from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.tally import NO_LABEL, Tally
from posttrain.data.report import number

NUM_FIRST = 5
WORD = re.compile(r"\w+")
LETTERS = re.compile("[\u0e00-\u0e7f\u3040-\ud7ff]")
"""Scripts that are written without spaces between words: their characters stand for words."""


def near(train: Tally, validation: Tally | None, settings: DoctorSettings) -> Iterator[Finding]:
    """Near duplicates within `train`, and rows of `validation` that are nearly in it."""
    if settings.near_rows == 0:
        sentence = "near duplicates were not looked for (near_rows=0)"
        yield finding("W-DATA-0119", 0, [], sentence, "--set near_rows=20000")
        return
    try:
        sketches = _Sketches(settings)
    except ImportError:
        sentence = "near duplicates were not looked for: datasketch is not installed"
        yield finding("W-DATA-0119", 0, [], sentence, "pip install 'posttrain[data]'")
        return
    if note := _partly(train, settings):
        yield note
    sampled = distinct(train)
    if found := list(sketches.add(sampled)):
        sentence = (
            f"{rows(len(found), 'are')} nearly an earlier one ({share(len(found), len(sampled))} of those looked at)"
        )
        yield _pairs("W-DATA-0102", found, train, train, sentence)
    if validation is None:
        return
    trained, hashes = set(train.array("row").tolist()), validation.array("row")
    others = [(row, text) for row, text in distinct(validation) if int(hashes[row]) not in trained]
    if leaked := list(sketches.find(others)):
        sentence = f"{rows(len(leaked))} of the validation data nearly as in a row that is trained on"
        yield _pairs("W-DATA-0103", leaked, validation, train, sentence)


class _Sketches:
    """MinHash sketches of texts, and which of them are alike. Raises ImportError without `datasketch`."""

    def __init__(self, settings: DoctorSettings):
        from datasketch import MinHash, MinHashLSH

        self.settings = settings
        self.make = MinHash.generator
        self.index = MinHashLSH(threshold=settings.near_similarity, num_perm=settings.near_permutations)
        self.sketches: dict[int, Any] = {}

    def add(self, texts: list[tuple[int, str]]) -> Iterator[tuple[int, int]]:
        """Keep each; those that are like one before come back with it."""
        for row, sketch in self._sketched(texts):
            if alike := self._alike(sketch):
                yield row, min(alike)
            self.sketches[row] = sketch
            self.index.insert(row, sketch, check_duplication=False)

    def find(self, texts: list[tuple[int, str]]) -> Iterator[tuple[int, int]]:
        """Those that are like one that is kept, with it."""
        for row, sketch in self._sketched(texts):
            if alike := self._alike(sketch):
                yield row, min(alike)

    def _sketched(self, texts: list[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
        sets = (shingles(text, self.settings.near_words) for _, text in texts)
        size, seed = self.settings.near_permutations, self.settings.seed + 1
        sketches = self.make(sets, num_perm=size, hashfunc=crc32, seed=seed)
        return zip((row for row, _ in texts), sketches, strict=True)

    def _alike(self, sketch: Any) -> list[int]:
        near_enough = self.settings.near_similarity
        return [row for row in self.index.query(sketch) if self.sketches[row].jaccard(sketch) >= near_enough]


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
    return finding(
        "W-DATA-0119", tally.used - settings.near_rows, [], sentence, f"--set near_rows={tally.used}, and time"
    )


def distinct(tally: Tally) -> list[tuple[int, str]]:
    """The sampled rows in order, the first of each set of exact duplicates. Ratings of one answer are one row: where
    they differ they contradict one another (E-DATA-0062), which is not to be said twice."""
    row, prompt, answer, label = (tally.array(name) for name in ("row", "prompt", "answer", "label"))
    first: dict[tuple[int, ...], tuple[int, str]] = {}
    for _, at, text in sorted(tally.sample, key=lambda item: item[1]):
        key = (int(row[at]),) if label[at] == NO_LABEL else (int(prompt[at]), int(answer[at]))
        first.setdefault(key, (at, text))
    return list(first.values())


def shingles(text: str, size: int) -> list[bytes]:
    """Every `size` words in a row; a text of fewer words is one."""
    text = LETTERS.sub(r" \g<0> ", text.lower()) if not text.isascii() else text.lower()
    words = WORD.findall(text)
    if len(words) <= size:
        return [" ".join(words).encode("utf-8", "surrogatepass")]
    found = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
    return [shingle.encode("utf-8", "surrogatepass") for shingle in found]
