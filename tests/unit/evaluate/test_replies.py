"""Replies: what is chosen names the customer and the order, what is rejected does not name both."""

from __future__ import annotations

from posttrain.evaluate.tasks import replies


def test_good_replies_name_customer_and_order_and_bad_ones_do_not() -> None:
    rows = replies.pairs(200, seed=0)
    for row in rows:
        wish = row["prompt"][0]["content"]
        name, order = wish.split(".")[0].removeprefix("My name is "), wish.split()[-1].rstrip(".")
        good, bad = (row[kind][0]["content"] for kind in ("chosen", "rejected"))
        assert name in good
        assert order in good
        assert not (name in bad and order in bad)
    assert {row["rejected"][0]["content"].split()[0] for row in rows} >= {"Dear", "Hello", "I'm", "Thank"}


def test_seeds_make_rows_and_other_seeds_others() -> None:
    assert replies.pairs(5, seed=1) == replies.pairs(5, seed=1) != replies.pairs(5, seed=2)
    for row in replies.prompts(20, seed=3):
        assert row["name"] in row["prompt"][0]["content"]
        assert row["order"] in row["prompt"][0]["content"]
