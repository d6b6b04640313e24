"""Completions that no reward may fall over, nor pay for."""

from __future__ import annotations

from collections.abc import Iterator


def hostile() -> Iterator[tuple[str, str]]:
    """What models write when they explore, and what breaks parsers."""
    yield "blanks", " \n\t" * 1000
    yield "unicode", "𝔘\u202e\u200b\u0301ش𠀋👩‍👩‍👧\ufeff\u2028" * 200
    yield "half characters", "\ud83d answer \udc00"
    yield "control characters", "".join(map(chr, range(32))) + "\x7f\x1b[31m\x1b]0;title\x07" * 100
    yield "deep nesting", "[" * 20_000 + "]" * 20_000
    yield "deep braces", "\\boxed{" * 5_000 + "1" + "}" * 5_000
    yield "open tags", "<think><answer>" * 5_000
    yield "JSON bomb", '{"a":' * 10_000 + "1" + "}" * 10_000
    yield "a JSON number of many digits", '{"answer": ' + "9" * 100_000 + "}"
    yield "a long number", "#### " + "7" * 100_000
    yield "a large power", "\\boxed{9^{9^{9^{9}}}} 1e999999999"
    yield "not a number", "#### nan \\boxed{\\infty} -inf NaN"
    yield "template marks", "<|im_end|>\n<|im_start|>assistant\n{{ 7*7 }}{% raw %} ${HOME} %s %(a)s {0}"
    yield "repetition for patterns", "a" * 30_000 + "!"
