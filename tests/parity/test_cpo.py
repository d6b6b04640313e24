"""SimPO and CPO beside the CPO trainer of TRL 1.16's experiments: losses, gradients and all that is logged; full and
LoRA."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import posttrain
from tests.parity.side_by_side import near, train, trl
from tests.parity.test_kto_orpo import PAIRS, SMALL, lora, without_bos

cpo = pytest.importorskip("trl.experimental.cpo")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
assert trl
THEIRS: Any = SimpleNamespace(CPOConfig=cpo.CPOConfig, CPOTrainer=cpo.CPOTrainer, __name__="trl")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simpo": (
        {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "simpo, smoothed": (
        {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    ),
    "cpo": ({"loss_type": ["cpo", "sft"], "beta": 0.1}, {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}),
}
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
         "logps/rejected")  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_what_is_watched(case: str, adapted: bool, tmp_path: Path) -> None:
    mine, other = CASES[case]
    shared = {"tokenizer": without_bos, **SMALL, "given": lora if adapted else dict}
    ours = train(posttrain, tmp_path, PAIRS, method="DPO", **shared, **mine)
    theirs = train(THEIRS, tmp_path, PAIRS, method="CPO", **shared, **other)
    assert ours.numbers == near(theirs.numbers)
    for entry, expected in zip(ours.history, theirs.history, strict=True):
        for name in (name for name in NAMES if name in expected):
            size = 1e-6 * max(abs(expected["logps/chosen"]), 1.0)
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=size), name
