"""What is kept of each row: hashes of 8 bytes, lengths, a label, a language, and marks of the rare things. A million
rows take about 60 MB; their texts are gone, but for a sample of beginnings and ends in which near duplicates are looked
for. Tallies of the parts of a file add up to the tally of the whole.
"""

from __future__ import annotations

import heapq
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from posttrain.data.codes import Row
from posttrain.data.doctor.content import (
    PART,
    TURN,
    RowReader,
    Said,
    earlier_answers,
    has_odd_systems,
)
from posttrain.data.doctor.languages import language
from posttrain.data.doctor.patterns import BIDI, CONTROL, is_refusal, personal_data, secrets
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.oddities import CODES as ODDITIES
from posttrain.data.passed_over import way_out
from posttrain.data.report import Cases
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.types import Origin

MASK = 2**64 - 1
SPREAD = 0x9E3779B97F4A7C15
"""An odd constant: multiplying by it mixes a hash with the seed and stays one to one (Fibonacci hashing)."""
COLUMNS = {"line": "i", "label": "b", "length": "i", "answer_length": "i", "rejected_length": "i", "earlier": "i"}
HASHES = ("row", "prompt", "answer", "rejected", "earlier_prompt", "earlier_answer")
NO_LABEL = -1
FORM = re.compile(r"[\W_]+")
ZERO = bytes(8)


@dataclass
class Bad:
    """A row that cannot be used, in words."""

    code: str
    where: str
    message: str
    hint: str | None


@dataclass
class Tally:
    """`hashes` and `numbers` have an entry for each usable row; a hash of 0 says that there is nothing to compare. But
    `earlier_prompt` and `earlier_answer` have one for each turn of the assistant before the answer, of which a row has
    as many as `earlier` says. `line` is -1 where the source has none; `files` are the sources and the index of the
    first usable row of each; `unread` says where the rest of a source could not be read. `unused` counts the columns
    that nothing is made of, `unrated` the rows whose `label` is null, `without_margin` the pairs that have none."""

    rows: int = 0
    used: int = 0
    files: list[tuple[str, int]] = field(default_factory=list)
    hashes: dict[str, bytearray] = field(default_factory=lambda: {name: bytearray() for name in HASHES})
    numbers: dict[str, array[int]] = field(default_factory=lambda: {name: array(t) for name, t in COLUMNS.items()})
    formats: Counter[str] = field(default_factory=Counter)
    methods: dict[str, Cases] = field(default_factory=dict)
    languages: dict[str, Cases] = field(default_factory=dict)
    marks: dict[str, Cases] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    unrated: Cases = field(default_factory=Cases)
    without_margin: Cases = field(default_factory=Cases)
    bad: dict[str, Cases] = field(default_factory=dict)
    bad_rows: list[Bad] = field(default_factory=list)
    unread: list[Bad] = field(default_factory=list)
    sample: list[tuple[int, int, str]] = field(default_factory=list)
    """A key, the row's index, its text: the rows with the smallest keys."""

    def origin(self, index: int) -> Origin:
        """Where the usable row of this index came from."""
        source, start = next((file, at) for file, at in reversed(self.files) if at <= index)
        line = self.numbers["line"][index]
        return Origin(source, index - start, line if line >= 0 else None)

    def array(self, name: str) -> np.ndarray:
        if name in self.hashes:
            return np.frombuffer(self.hashes[name], dtype=np.uint64)
        return np.frombuffer(self.numbers[name], dtype=COLUMNS[name])

    def mark(self, code: str, origin: Origin, found: list[tuple[str, str]] | None = None) -> None:
        """A rare thing in a row, and if there are several kinds of it, which and how they look."""
        self.marks.setdefault(code, Cases()).add(origin)
        for what, how in found or ():
            self.kinds.setdefault(code, Counter())[what] += 1
            shown = self.shown.setdefault(code, [])
            if len(shown) < 5:
                shown.append(f"{origin}: {what} {how}")

    def add(self, other: Tally, settings: DoctorSettings, max_errors: int) -> None:
        """`other` is of the rows that come after these."""
        for name, start in other.files:
            if not self._continues(name):
                self.files.append((name, start + self.used))
        self.sample += [(key, index + self.used, text) for key, index, text in other.sample]
        prune(self.sample, settings.near_rows)
        self.rows += other.rows
        self.used += other.used
        for name in HASHES:
            self.hashes[name] += other.hashes[name]
        for name in COLUMNS:
            self.numbers[name] += other.numbers[name]
        self.formats += other.formats
        self.unused += other.unused
        _join(self.unrated, other.unrated)
        _join(self.without_margin, other.without_margin)
        for mine, theirs in ((self.methods, other.methods), (self.languages, other.languages),
                             (self.marks, other.marks), (self.bad, other.bad)):  # fmt: skip
            for key, cases in theirs.items():
                _join(mine.setdefault(key, Cases()), cases)
        for code, counts in other.kinds.items():
            self.kinds.setdefault(code, Counter()).update(counts)
        for code, lines in other.shown.items():
            self.shown[code] = (self.shown.get(code, []) + lines)[:5]
        self.bad_rows = (self.bad_rows + other.bad_rows)[:max_errors]
        self.unread += other.unread

    def _continues(self, name: str) -> bool:
        return bool(self.files) and self.files[-1][0] == name


class Counting:
    """Rows in, a tally out."""

    def __init__(self, data: DataSettings, settings: DoctorSettings, max_errors: int, key_limit: int = MASK):
        self.tally, self.settings, self.max_errors, self.key_limit = Tally(), settings, max_errors, key_limit
        self.reader = RowReader(data)
        self.mix = (settings.seed * SPREAD + 1) & MASK
        self.bare = Origin("", 0)

    def row(self, row: Row, origin: Origin) -> None:
        """One row that could be read. A broken one is parsed again with its origin, if it is to be shown: finding a
        value's column means reading the file up to it."""
        self.tally.rows += 1
        if not self.tally._continues(origin.source):
            self.tally.files.append((origin.source, self.tally.used))
        try:
            said = self.reader.read(row, self.bare)
        except DataError as error:
            self._bad(self._located(row, origin) if self._is_shown() else error, origin)
        else:
            self._usable(said, origin)

    def reject(self, error: DataError, origin: Origin) -> None:
        """A row that could not even be read."""
        self.tally.rows += 1
        self._bad(error, origin)

    def stopped(self, error: DataError | RecursionError, origin: Origin) -> None:
        """A fault that no row can be read after: not one bad row, whatever is done about those."""
        if isinstance(error, RecursionError):
            message = f"{origin}  not valid JSON: nested too deeply to be read"
            error = DataError(message, hint="write such a value as text", code="E-DATA-0002")
        self.tally.unread.append(Bad(error.code, str(origin), error.message, error.hint))

    def _located(self, row: Row, origin: Origin) -> DataError:
        try:
            self.reader.read(row, origin)
        except DataError as error:
            return error
        raise AssertionError("a row that fails must fail again")

    def _is_shown(self) -> bool:
        return len(self.tally.bad_rows) < self.max_errors

    def _bad(self, error: DataError, origin: Origin) -> None:
        self.tally.bad.setdefault(error.code, Cases()).add(origin)
        if self._is_shown():
            self.tally.bad_rows.append(Bad(error.code, str(origin), error.message, error.hint))

    def _usable(self, said: Said, origin: Origin) -> None:
        tally = self.tally
        tally.formats[said.format] += 1
        tally.methods.setdefault(said.method, Cases()).add(origin)
        content = TURN.join((said.prompt, *said.answers))
        row_hash = _hash(f"{content}{PART}{said.label}{said.rest}")
        hashes = tally.hashes
        hashes["row"] += row_hash
        hashes["prompt"] += _hash(said.rest + said.prompt) if said.prompt else ZERO
        hashes["answer"] += _hash(said.answers[0])
        hashes["rejected"] += _hash(said.answers[1]) if len(said.answers) > 1 else ZERO
        numbers = tally.numbers
        numbers["earlier"].append(self._earlier(said))
        numbers["line"].append(origin.line if origin.line is not None else -1)
        numbers["label"].append(NO_LABEL if said.label is None else said.label)
        numbers["length"].append(said.length)
        spoken = said.spoken
        numbers["answer_length"].append(len(spoken[0]) if spoken else 0)
        numbers["rejected_length"].append(len(spoken[1]) if len(spoken) > 1 else -1)
        self._marks(said, content, origin)
        self._passed_over(said, origin)
        if self.settings.near_rows and content and said.spoken:
            self._sample(row_hash, content)
        tally.used += 1

    def _earlier(self, said: Said) -> int:
        """Count in the assistant's turns before the answer, each as if it were a row's answer; how many. What comes
        before them is hashed once, however many there are."""
        hashes, found, done = self.tally.hashes, [*earlier_answers(said.prompt)], 0
        before = blake2b(said.rest.encode("utf-8", "surrogatepass"), digest_size=8)
        for start, end in found:
            before.update(said.prompt[done:start].encode("utf-8", "surrogatepass"))
            hashes["earlier_prompt"] += before.digest()
            hashes["earlier_answer"] += _hash(said.prompt[start:end])
            done = start
        return len(found)

    def _marks(self, said: Said, content: str, origin: Origin) -> None:
        tally = self.tally
        if CONTROL.search(content):
            tally.mark("W-DATA-0112", origin)
        if not content.isascii() and BIDI.search(content):
            tally.mark("W-DATA-0113", origin)
        if has_odd_systems(content):
            tally.mark("W-DATA-0129", origin)
        if found := list(secrets(content)):
            tally.mark("W-DATA-0114", origin, found)
        if found := list(personal_data(content)):
            tally.mark("W-DATA-0115", origin, found)
        if len(said.answers) > 1 and said.answers[0] == said.answers[1]:
            tally.mark("E-DATA-0060", origin)
        elif len(said.answers) > 1 and _letters(said.answers[0]) == _letters(said.answers[1]):
            tally.mark("W-DATA-0120", origin)
        if not said.spoken:
            return
        answer = said.spoken[0]
        if said.label is not False and said.prompt and is_refusal(answer):
            tally.mark("W-DATA-0108", origin)
        spoken_in = language(answer, self.settings.language_words)
        if spoken_in is not None:
            tally.languages.setdefault(spoken_in, Cases()).add(origin)
            asked_in = language(said.asked, self.settings.language_words) if said.prompt else None
            if asked_in is not None and asked_in != spoken_in:
                tally.mark("W-DATA-0116", origin, [(f"{asked_in} → {spoken_in}", "")])

    def _passed_over(self, said: Said, origin: Origin) -> None:
        tally, over = self.tally, said.over
        tally.unused.update(over.columns)
        if over.meant:
            tally.mark("W-DATA-0131", origin, [(f"`{name}`", f"({way_out(name)})") for name in over.meant])
        if over.formats:
            tally.mark("W-DATA-0132", origin, [(name, "passed over") for name in over.formats])
        for name in said.odd:
            tally.mark(ODDITIES[name], origin)
        if said.is_unrated:
            tally.unrated.add(origin)
        if said.method == "preference" and not said.has_margin:
            tally.without_margin.add(origin)

    def _sample(self, row_hash: bytes, content: str) -> None:
        """The rows with the smallest keys are a random sample that does not depend on how the file was cut."""
        key = ((int.from_bytes(row_hash, "little") ^ self.mix) * SPREAD) & MASK
        if key > self.key_limit:
            return
        self.tally.sample.append((key, self.tally.used, self.settings.cut(content)))
        if len(self.tally.sample) > 2 * self.settings.near_rows:
            prune(self.tally.sample, self.settings.near_rows)


def _letters(text: str) -> str:
    """What of a text says something, but for its spelling: for telling answers that differ in form alone. An answer of
    signs only is compared by them."""
    return FORM.sub("", text).casefold() or text


def prune(sample: list[tuple[int, int, str]], size: int) -> None:
    if len(sample) > size:
        sample[:] = heapq.nsmallest(size, sample)


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _join(mine: Cases, theirs: Cases) -> None:
    mine.count += theirs.count
    mine.first = (mine.first + theirs.first)[:5]
