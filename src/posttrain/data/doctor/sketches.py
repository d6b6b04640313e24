"""MinHash sketches of texts, and which of them are alike (Broder 1997; `datasketch` makes them and chooses the bands).

Of each hash the lowest 16 bits are kept, so that a sketch of 128 takes 256 bytes. What two share by chance then is one
in 65,536, which no threshold notices. Sketches that agree in a whole band are candidates: each is compared with the
first and with the last one before it in its bucket, so that time is linear even where all rows are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from zlib import crc32

import numpy as np

from posttrain.data.doctor.settings import DoctorSettings

WORD = re.compile(r"\w+")
LETTERS = re.compile("[\u0e00-\u0e7f\u3040-\ud7ff]")
"""Scripts that are written without spaces between words: their characters stand for words."""
CHUNK = 1000
COMPARED = 20_000
"""Pairs that are compared at once: 5 MB."""
ODD = np.uint64(0x9E3779B97F4A7C15)

Agree = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _always(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.ones(len(some), dtype=bool)


class Sketches:
    """How texts are sketched and compared. Raises ImportError without `datasketch`."""

    def __init__(self, settings: DoctorSettings):
        from datasketch import MinHash, MinHashLSH

        self.settings = settings
        self.make = MinHash.generator
        threshold = min(settings.near_similarity, 0.9)  # of more it would make one band; what is found is compared
        index = MinHashLSH(threshold=threshold, num_perm=settings.near_permutations)
        self.bands, self.rows = int(index.b), int(index.r)

    def of(self, sets: Iterable[list[bytes]]) -> np.ndarray:
        """A sketch of each set of shingles, in rows; the sets are taken as they come."""
        size, seed, sets = self.settings.near_permutations, self.settings.seed + 1, iter(sets)
        parts = [np.empty((0, size), np.uint16)]
        while chunk := list(islice(sets, CHUNK)):
            made = self.make(chunk, num_perm=size, hashfunc=crc32, seed=seed)
            parts.append(np.stack([sketch.hashvalues for sketch in made]).astype(np.uint16))
        return np.concatenate(parts)

    def earlier(self, sketches: np.ndarray, known: int | None = None, agree: Agree = _always) -> np.ndarray:
        """Of each sketch the index of one before it that it is like, or -1. With `known`, only the first so many are
        ones to be like, and only the others are asked. `agree` says of pairs whether they may be alike at all."""
        count = len(sketches)
        limit, found = count if known is None else known, np.full(count, count, dtype=np.int64)
        for band in range(self.bands):
            for later, sooner in _candidates(sketches[:, band * self.rows : (band + 1) * self.rows], limit):
                asked = (found[later] > sooner) & ((known is None) | (later >= limit))
                later, sooner = later[asked], sooner[asked]
                alike = self.alike(sketches, later, sooner) & agree(later, sooner)
                np.minimum.at(found, later[alike], sooner[alike])
        return np.where(found == count, -1, found)

    def alike(self, sketches: np.ndarray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether the sketches of these indices are alike, one by one."""
        result = np.zeros(len(some), dtype=bool)
        for start in range(0, len(some), COMPARED):
            part = slice(start, start + COMPARED)
            same = (sketches[some[part]] == sketches[others[part]]).mean(axis=1)
            result[part] = same >= self.settings.near_similarity
        return result


def _candidates(band: np.ndarray, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of entries, and for each the first of its bucket; then the last one before it. Only entries below `limit`
    are such ones."""
    codes = _codes(band)
    order = np.argsort(codes, kind="stable")
    ordered, places = codes[order], np.arange(len(order))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(begins, places, 0))
    before = np.concatenate([[-1], np.maximum.accumulate(np.where(order < limit, places, -1))[:-1]])
    has_one = before >= first
    yield order[has_one], order[first[has_one]]
    another = has_one & (before > first)
    yield order[another], order[before[another]]


def _codes(band: np.ndarray) -> np.ndarray:
    """64 bits of each row's values."""
    codes = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        codes = (codes ^ column) * ODD
        codes ^= codes >> np.uint64(29)
    return codes


def shingles(text: str, size: int) -> list[bytes]:
    """Every `size` words in a row; a text of fewer words is one."""
    text = LETTERS.sub(r" \g<0> ", text.lower()) if not text.isascii() else text.lower()
    words = WORD.findall(text)
    if len(words) <= size:
        return [" ".join(words).encode("utf-8", "surrogatepass")]
    found = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
    return [shingle.encode("utf-8", "surrogatepass") for shingle in found]
