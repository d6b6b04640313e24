"""Token ids of pairs and of rated answers equal those that TRL 1.16's DPOTrainer and KTOTrainer train on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.prepare import prepare
from posttrain.data.ratings import with_mismatched
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.models.scoring import as_classifier
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

TEXT = [
    {
        "prompt": f"What is {i} plus two?" + " " * (i % 3),
        "chosen": f" It is {i + 2}." * (1 + i % 3),
        "rejected": f"{'No' if i % 2 else ' none'} {i} idea!" * (1 + i % 4),
    }
    for i in range(12)
]
IMPLICIT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TEXT] + [
    {"chosen": "unhappy people", "rejected": "unhappily"},
    {"chosen": "Hello there", "rejected": "Hello you"},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TEXT
]
IMPLICIT_CHAT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHAT]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = [
    {**row, "tools": json.dumps([{"name": f"add{i}"}]), "chat_template_kwargs": {"mood": "gladly "}}
    for i, row in enumerate(CHAT)
]
TOKENIZERS: dict[str, Any] = {
    "plain": plain_tokenizer,
    "bos": lambda: plain_tokenizer(bos=True),
    "chatml": chatml_tokenizer,
    "chatml, bos": lambda: chatml_tokenizer(bos=True),
    "tools": lambda: plain_tokenizer(template=TOOL_TEMPLATE),
}
CASES: list[tuple[str, list[dict[str, Any]]]] = [
    *[(words, rows) for words in ("plain", "bos") for rows in (TEXT, IMPLICIT)],
    *[(words, rows) for words in ("chatml", "chatml, bos") for rows in (CHAT, IMPLICIT_CHAT)],
    ("tools", TOOLS),
]
LENGTHS = [(None, "keep_start"), (40, "keep_start"), (28, "keep_start"), (9, "keep_end")]


def ours(
    rows: list[dict[str, Any]], tokenizer: Any, kind: str, mismatched: int | None = None, **settings: Any
) -> list[list[tuple[Any, Any]]]:
    """Ids and mask of every sequence, sample by sample; behind them a rating's label."""
    columns = ("label",) if kind == "rated" else ()
    tuned = DataSettings(method=kind, completion_only=True, columns=columns, on_bad_row="skip", **settings)
    samples = prepare(rows, tokenizer, tuned).samples
    if mismatched:
        samples = with_mismatched(samples, mismatched, tuned.max_length)
    found = []
    for (tree,) in samples:
        wholes = [
            (
                np.concatenate([tree.prefix, branch.ids]).tolist(),
                [0] * len(tree.prefix) + branch.supervised.astype(int).tolist(),
            )
            for branch in tree.branches
        ]
        found.append(wholes + ([(tree.columns["label"], None)] if kind == "rated" else []))
    return found


@pytest.mark.parametrize(("max_length", "mode"), LENGTHS)
@pytest.mark.parametrize(("words", "rows"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_pairs(words: str, rows: list[dict[str, Any]], max_length: int | None, mode: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[words]()
    model = tiny_model("llama", len(tokenizer))
    args = trl.DPOConfig(str(tmp_path), max_length=max_length, truncation_mode=mode, use_cpu=True, bf16=False,
                         report_to="none")  # fmt: skip
    theirs = trl.DPOTrainer(
        model, copy.deepcopy(model), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    expected = []
    for row in theirs.train_dataset:
        batch = theirs.data_collator([row])
        expected.append(
            [
                (ids[: int(there.sum())].tolist(), mask[: int(there.sum())].tolist())
                for ids, there, mask in zip(
                    batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
                )
            ]
        )
    if not expected:
        pytest.skip("nothing is left")
    assert ours(rows, TOKENIZERS[words](), "preference", max_length=max_length, truncation_mode=mode) == expected


REWARD_CASES: list[tuple[str, list[dict[str, Any]]]] = [
    ("plain", TEXT), ("bos", TEXT), ("plain", IMPLICIT), ("chatml", CHAT), ("chatml, bos", IMPLICIT_CHAT),
    ("tools", TOOLS),
]  # fmt: skip


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize(("words", "rows"), REWARD_CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_pairs_of_reward_models(words: str, rows: list[dict[str, Any]], max_length: int | None, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[words]()
    model = as_classifier(tiny_model("llama", len(tokenizer)))
    args = trl.RewardConfig(str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to="none")
    theirs = trl.RewardTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    expected = [[row["chosen_ids"], row["rejected_ids"]] for row in theirs.train_dataset]
    if not expected:
        pytest.skip("nothing is left")
    found = ours(rows, TOKENIZERS[words](), "preference", max_length=max_length, truncation_mode="drop")
    assert [[ids for ids, _ in pair] for pair in found] == expected


RATED = [
    {"prompt": row["prompt"], "completion": row["chosen"] if i % 3 else row["rejected"], "label": i % 3 > 0}
    for i, row in enumerate(TEXT)
]
RATED_CHAT = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(CHAT)]
RATED_CASES: list[tuple[str, list[dict[str, Any]]]] = [
    ("plain", RATED), ("bos", RATED), ("plain", TEXT), ("bos", IMPLICIT), ("chatml", RATED_CHAT),
    ("chatml, bos", IMPLICIT_CHAT), ("tools", TOOLS),
]  # fmt: skip


@pytest.mark.parametrize("max_length", [None, 40, 28])
@pytest.mark.parametrize(("words", "rows"), RATED_CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_ratings_and_the_mismatched_answers(
    words: str, rows: list[dict[str, Any]], max_length: int | None, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[words]()
    model = tiny_model("llama", len(tokenizer))
    args = trl.KTOConfig(str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to="none",
                         per_device_train_batch_size=5)  # fmt: skip
    theirs = trl.KTOTrainer(
        model, copy.deepcopy(model), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    expected = []
    for row in theirs.train_dataset:
        batch = theirs.data_collator([row])
        wholes = []
        for kind in ("", "KL_"):
            length = int(batch[f"{kind}attention_mask"].sum())
            ids, mask = (batch[f"{kind}{name}"][0, :length].tolist() for name in ("input_ids", "completion_mask"))
            wholes.append((ids, mask))
        expected.append([*wholes, (row["label"], None)])
    if not expected:
        pytest.skip("nothing is left")
    assert ours(rows, TOKENIZERS[words](), "rated", mismatched=5, max_length=max_length) == expected


def test_a_conversation_is_rated_by_its_last_turn() -> None:
    rows = [{"messages": row["prompt"] + row["completion"], "label": row["label"]} for row in RATED_CHAT]
    tokenizer = chatml_tokenizer()
    assert ours(rows, tokenizer, "rated") == ours(RATED_CHAT, tokenizer, "rated")


@pytest.mark.parametrize("row", [TEXT[0], CHAT[0]], ids=["text", "messages"])
def test_a_pair_of_the_same_answers_is_no_two_ratings(row: dict[str, Any]) -> None:
    rows = [CHAT[1] if row is CHAT[0] else TEXT[1], {**row, "rejected": row["chosen"]}]
    settings = DataSettings(method="rated", completion_only=True, columns=("label",))
    with pytest.raises(DataError, match="is the very answer that is chosen") as caught:
        prepare(rows, chatml_tokenizer(), settings)
    assert caught.value.code == "E-DATA-0029"
    assert len(ours(rows, chatml_tokenizer(), "rated")) == 2  # of the other pair
