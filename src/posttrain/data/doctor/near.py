"""Near duplicates: rows that share most of their words in order, found by MinHash and locality-sensitive hashing
(Broder 1997; `datasketch`). Exact duplicates are not among them.

Sets of a few words in a row are compared, in lower case and without punctuation. The similarity is an estimate. Of large data only
the tally's sample is looked at, and the finding says so: a sample of one row in ten holds one pair in a hundred.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from zlib import crc32

from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.tally import Tally
from posttrain.data.report import number

WORD = re.compile(r"\w+")
LETTERS = re.compile("[\u0e00-\u0e7f\u3040-\ud7ff]")
"""Scripts that are written without spaces between words: their characters stand for words."""


def near(train: Tally, validation: Tally | None, settings: DoctorSettings) -> Iterator[Finding]:
    """Near duplicates within `train`, and rows of `validation` that are nearly in it."""
    if settings.near_rows == 0:
        yield finding("W-DATA-0119", 0, [], "near duplicates were not looked for (near_rows=0)", "--set near_rows=20000")
        return
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        yield finding("W-DATA-0119", 0, [], "near duplicates were not looked for: datasketch is not installed",
                      "pip install 'posttrain[data]'")  # fmt: skip
        return
    if note := _partly(train, settings):
        yield note
    rows_of_train, rows_of_validation = distinct(train), distinct(validation) if validation else []
    index = MinHashLSH(threshold=settings.near_similarity, num_perm=settings.near_permutations)
    sketches = {}
    make = dict(num_perm=settings.near_permutations, hashfunc=crc32, seed=settings.seed + 1)

    def sketched(texts: list[str]) -> Iterator[MinHash]:
        return MinHash.generator([shingles(text, settings.near_words) for text in texts], **make)

    def alike(sketch: MinHash) -> list[int]:
        return [key for key in index.query(sketch) if sketches[key].jaccard(sketch) >= settings.near_similarity]

    found: list[tuple[int, int]] = []
    for (row, _), sketch in zip(rows_of_train, sketched([text for _, text in rows_of_train]), strict=True):
        if earlier := alike(sketch):
            found.append((row, min(earlier)))
        sketches[row] = sketch
        index.insert(row, sketch, check_duplication=False)
    if found:
        sentence = f"{rows(len(found))} ({share(len(found), len(rows_of_train))} of those looked at) are nearly an earlier one"
        pairs = [f"{train.origin(row)} ~ {train.origin(earlier)}" for row, earlier in found[:5]]
        yield finding("W-DATA-0102", len(found), [train.origin(row) for row, _ in found[:5]], sentence, pairs=pairs)
    if validation is None:
        return
    trained = set(train.array("row").tolist())
    hashes = validation.array("row")
    rows_of_validation = [(row, text) for row, text in rows_of_validation if int(hashes[row]) not in trained]
    leaked = []
    for (row, _), sketch in zip(rows_of_validation, sketched([text for _, text in rows_of_validation]), strict=True):
        if there := alike(sketch):
            leaked.append((row, min(there)))
    if leaked:
        sentence = f"{rows(len(leaked))} of the validation data are nearly a row that is trained on"
        pairs = [f"{validation.origin(row)} ~ {train.origin(there)}" for row, there in leaked[:5]]
        first = [validation.origin(row) for row, _ in leaked[:5]]
        yield finding("W-DATA-0103", len(leaked), first, sentence, pairs=pairs)


def _partly(tally: Tally, settings: DoctorSettings) -> Finding | None:
    if tally.used <= settings.near_rows:
        return None
    sentence = (
        f"near duplicates were looked for among {number(settings.near_rows)} rows drawn from {number(tally.used)}: "
        "few of the pairs are seen"
    )
    return finding("W-DATA-0119", tally.used - settings.near_rows, [], sentence, f"--set near_rows={tally.used}, and time")


def distinct(tally: Tally) -> list[tuple[int, str]]:
    """The sampled rows in order, the first of each set of exact duplicates."""
    hashes = tally.array("row")
    first: dict[int, tuple[int, str]] = {}
    for _, row, text in sorted(tally.sample, key=lambda item: item[1]):
        first.setdefault(int(hashes[row]), (row, text))
    return list(first.values())


def shingles(text: str, size: int) -> list[bytes]:
    """Every `size` words in a row; a text of fewer words is one."""
    text = LETTERS.sub(r" \g<0> ", text.lower()) if not text.isascii() else text.lower()
    words = WORD.findall(text)
    if len(words) <= size:
        return [" ".join(words).encode("utf-8", "surrogatepass")]
    return [shingle.encode("utf-8", "surrogatepass") for shingle in {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}]
