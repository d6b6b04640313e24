from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from posttrain.evaluate.curves import curves

LOG = [
    {"step": 1, "reward": 0.0, "kl": 0.1},
    {"step": 2, "reward": 1.0},
    {"step": 4, "reward": 0.5, "kl": float("nan")},
]


def test_lines_lie_where_the_numbers_say() -> None:
    picture = curves(LOG, [("reward",)], "how <it> went")
    ElementTree.fromstring(picture)
    assert "how &lt;it&gt; went" in picture
    assert "M224.0 240.0L384.0 60.0L704.0 150.0" in picture  # a quarter of the way, half of it, all of it
    assert ">step 4<" in picture


def test_what_is_no_number_is_left_out() -> None:
    assert "M224.0" in curves(LOG, [("kl", "reward")], "both")
    assert "nan" not in curves(LOG, [("kl",)], "kl")
    assert "<path" not in curves(LOG, [("nothing",)], "nothing")


def test_a_running_mean_begins_at_the_first_value() -> None:
    smooth = curves(LOG, [("reward",)], "smooth", smoothing=0.5)
    assert smooth.count("<path") == 3
    assert 'stroke-opacity="0.25"' in smooth
