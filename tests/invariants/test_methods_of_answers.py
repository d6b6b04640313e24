"""KTO, ORPO and reward models: the same however a step is cut and however prompts lie, killed and resumed bit for bit,
and nothing about the labels goes unsaid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import posttrain
from posttrain import CheckpointError, ConfigError, DataError
from posttrain.models import forward
from posttrain.trainers.base import PackedTrainer
from tests.invariants.test_preference_runs import ROWS, history, weights
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

RATED: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
    for i, row in enumerate(ROWS)
]
METHODS: dict[str, Any] = {"KTO": RATED, "ORPO": ROWS, "Reward": ROWS}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def trainer(
    method: str, folder: Path, adapted: bool = False, rows: Any = None, family: str = "llama", **options: Any
) -> PackedTrainer:
    tokenizer = chatml_tokenizer()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-3, "bf16": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)} if adapted else {}
    made: PackedTrainer = getattr(posttrain, f"{method}Trainer")(
        tiny_model(family, len(tokenizer)),
        args=getattr(posttrain, f"{method}Config")(str(folder), **settings),
        train_dataset=METHODS[method] if rows is None else rows,
        processing_class=tokenizer,
        **peft,
    )
    return made


@pytest.mark.parametrize("cut", [{"token_budget": 1}, {"token_budget": 90}, {"per_device_train_batch_size": 2,
                                 "gradient_accumulation_steps": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", ["ORPO", "Reward"])
def test_however_it_is_cut(method: str, cut: dict[str, Any], tmp_path: Path) -> None:
    whole, other = trainer(method, tmp_path / "a", max_grad_norm=0.0), trainer(method, tmp_path / "b",
                                                                               max_grad_norm=0.0, **cut)  # fmt: skip
    for one in (whole, other):
        one.train()
    assert history(other, "loss", "grad_norm") == pytest.approx(history(whole, "loss", "grad_norm"), rel=2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "lfm2"])
@pytest.mark.parametrize("method", METHODS)
def test_however_prompts_lie(method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = trainer(method, tmp_path / "a", family=family)
    shared.train()
    monkeypatch.setattr(forward, "_shares_prompts", lambda policy: False)
    repeated = trainer(method, tmp_path / "b", family=family)
    repeated.train()
    names = ("loss", "grad_norm")
    assert history(repeated, *names) == pytest.approx(history(shared, *names), rel=5e-5)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed(method: str, adapted: bool, tmp_path: Path) -> None:
    options = {"adapted": adapted, "save_strategy": "steps", "save_steps": 1, "disable_dropout": False}
    undisturbed = trainer(method, tmp_path / "a", **options)
    undisturbed.train()
    for step in (1, 4):
        resumed = trainer(method, tmp_path / "a", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        for name, value in weights(undisturbed).items():
            assert torch.equal(value, weights(resumed)[name]), name
        assert history(resumed, "loss", "grad_norm") == history(undisturbed, "loss", "grad_norm")


def test_other_labels_are_another_run(tmp_path: Path) -> None:
    trainer("KTO", tmp_path, save_strategy="steps", save_steps=2).train()
    rows = [{**row, "label": not row["label"]} for row in RATED]
    with pytest.raises(CheckpointError, match="training data"):
        trainer("KTO", tmp_path, rows=rows).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream(method: str, tmp_path: Path) -> None:
    stream = trainer(method, tmp_path / "s", rows=iter(METHODS[method] * 3), max_steps=2, num_train_epochs=1)
    plain = trainer(method, tmp_path / "p", max_steps=2, train_sampling_strategy="sequential")
    for one in (stream, plain):
        one.train()
    assert history(stream, "loss") == pytest.approx(history(plain, "loss"), rel=1e-5)


# --- KTO's labels ---------------------------------------------------------------------------------------------------


def test_labels_that_are_out_of_balance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two good answers to one bad: half the weight, or up to two thirds."""
    rows = [{**row, "label": i % 3 > 0} for i, row in enumerate(RATED[:6])]
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        trainer("KTO", tmp_path, rows=rows)
    assert "4 good and 2 bad answers weigh 2 to 1" in caplog.text
    assert "set desirable_weight between 0.5 and 0.667" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        trainer("KTO", tmp_path, rows=rows, desirable_weight=0.6, learning_rate=1e-6)
    assert not [record for record in caplog.records if record.name == "posttrain"]


def test_what_the_first_rows_of_a_stream_teach_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Contradictions, length and balance; what only the end of the rows could say is left to it."""
    streamed = pytest.importorskip("datasets").Dataset.from_list
    pairs = [{**ROWS[0], "chosen": f" it is number {i}, I am sure", "rejected": f" {i}"} for i in range(40)]
    reverse = {**pairs[0], "chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}
    trainer("DPO", tmp_path / "d", rows=streamed([*pairs, reverse]).to_iterable_dataset(), max_steps=1)
    assert "of the first 41 rows of the stream: 1 rows say the opposite of another" in caplog.text
    assert "of the first 41 rows of the stream: the chosen answer is the longer one in 98 % of pairs" in caplog.text
    rows = [{**row, "label": i % 3 > 0} for i, row in enumerate(RATED[:5])]
    trainer("KTO", tmp_path / "k", rows=streamed(rows).to_iterable_dataset(), max_steps=1)
    assert "of the first 5 rows of the stream: 3 good and 2 bad answers weigh 1.5 to 1" in caplog.text
    assert "alone in its batch" not in caplog.text


def test_labels_that_come_sorted_or_all_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        trainer("KTO", tmp_path, rows=sorted(RATED, key=lambda row: row["label"]))
    assert "the rows are sorted; set shuffle_dataset=True" in caplog.text
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        trainer("KTO", tmp_path, rows=[{**row, "label": True} for row in RATED])
    assert "every answer is labelled True" in caplog.text


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 1}, {"train_sampling_strategy": "random"},
                                     {"shuffle_dataset": True}], ids=lambda options: next(iter(options)))  # fmt: skip
def test_sorted_labels_are_nothing_to_losses_that_shuffle(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = sorted(RATED, key=lambda row: row["label"])
    trainer("KTO", tmp_path, rows=rows, loss_type="apo_zero_unpaired", **options)
    assert "sorted" not in caplog.text


def test_answers_that_weigh_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer("KTO", tmp_path, undesirable_weight=0.0)
    assert "undesirable_weight=0 leaves 4 of 8 answers out" in caplog.text
    assert "between" not in caplog.text
    with pytest.raises(ConfigError, match="leave nothing to learn"):
        trainer("KTO", tmp_path, desirable_weight=0.0, undesirable_weight=0.0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_answer_of_a_stream_alone(drop_last: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = pytest.importorskip("datasets").Dataset.from_list(RATED[:5]).to_iterable_dataset()
    one = trainer("KTO", tmp_path, rows=stream, max_steps=3, dataloader_drop_last=drop_last)
    one.train()
    assert ("the last answer of pass 1 over the stream is alone in its batch of 4" in caplog.text) is not drop_last
    tokens = [entry["num_tokens"] for entry in one.state.log_history if "loss" in entry]
    assert (tokens[1] == 2 * tokens[0]) is drop_last


@pytest.mark.parametrize(
    "wrong",
    [{"per_device_train_batch_size": 1}, {"train_sampling_strategy": "random"}, {"truncation_mode": "keep_end"},
     {"loss_type": "dpo"}, {"beta": 0.0}, {"desirable_weight": -1.0}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_kto_settings_that_mean_nothing(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        trainer("KTO", tmp_path, **wrong)


@pytest.mark.parametrize("wrong", [{"generate_during_eval": True}, {"max_completion_length": 5}, {"beta": -1.0},
                                   {"is_encoder_decoder": True}], ids=lambda wrong: next(iter(wrong)))  # fmt: skip
def test_orpo_settings_that_are_not_honoured(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        trainer("ORPO", tmp_path, **wrong)


# --- reward models' rows --------------------------------------------------------------------------------------------


MARGINS: list[dict[str, Any]] = [{**row, "margin": i / 4} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("margin", ["much", True, float("nan"), [1]])
def test_a_margin_that_is_no_number(margin: Any, tmp_path: Path) -> None:
    rows = [*MARGINS[:3], {**ROWS[3], "margin": margin}, *MARGINS[4:]]
    with pytest.raises(DataError, match=r'train\[3\]  "margin" is .*, which is no finite number'):
        trainer("Reward", tmp_path, rows=rows)
    report = trainer("Reward", tmp_path, rows=rows, on_bad_row="skip").data_reports["train"]
    assert (report.used, report.num_skipped) == (7, 1)


@pytest.mark.parametrize("without", [ROWS[1], {**ROWS[1], "margin": None}], ids=["left out", "null"])
def test_some_margins_only(without: dict[str, Any], tmp_path: Path) -> None:
    rows = [MARGINS[0], without, *MARGINS[2:]]
    with pytest.raises(ConfigError, match=r"train\[1\] has no margin, and 7 of 8 pairs have one"):
        trainer("Reward", tmp_path, rows=rows)
    with pytest.raises(ConfigError, match=r"train\[1\] has no margin, and 1 of 2 pairs have one"):
        trainer("Reward", tmp_path, rows=iter(rows), max_steps=2).train()


def test_a_column_of_nulls_is_no_margin_and_a_text_may_be_one(tmp_path: Path) -> None:
    nulls, none = ([{**row, **more} for row in ROWS] for more in ({"margin": None}, {}))
    texts = [{**row, "margin": str(row["margin"])} for row in MARGINS]  # as CSV has them
    runs = [trainer("Reward", tmp_path, rows=rows, max_steps=2) for rows in (nulls, none, texts, MARGINS)]
    for one in runs:
        one.train()
    losses = [history(one, "loss") for one in runs]
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_margins_of_a_stream(tmp_path: Path) -> None:
    stream = trainer("Reward", tmp_path, rows=iter(MARGINS), max_steps=2)
    plain = trainer("Reward", tmp_path, rows=MARGINS, max_steps=2, train_sampling_strategy="sequential")
    for one in (stream, plain):
        one.train()
    assert history(stream, "loss") == pytest.approx(history(plain, "loss"), rel=1e-5)


@pytest.mark.parametrize("method", ["DPO", "ORPO", "KTO"])
def test_margins_are_for_reward_models(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        trainer(method, tmp_path, rows=MARGINS)
    assert "8 rows (first: train[0]) have `margin`" in caplog.text
    assert "reward models alone learn from margins" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="posttrain"):
        trainer("Reward", tmp_path, rows=MARGINS)
    assert "have `margin`" not in caplog.text


@pytest.mark.parametrize("given", [list, iter], ids=["list", "stream"])
def test_an_answer_of_padding_only_has_no_score(given: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def made(**options: Any) -> Any:
        tokenizer = chatml_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        rows = [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No."} for i in range(4)]
        rows[2]["rejected"] = tokenizer.eos_token
        args = posttrain.RewardConfig(str(tmp_path), bf16=False, max_steps=1, per_device_train_batch_size=3,
                                      learning_rate=1e-6, report_to="none", logging_steps=1, **options)  # fmt: skip
        return posttrain.RewardTrainer(
            tiny_model("llama", len(tokenizer)), args, train_dataset=given(rows), processing_class=tokenizer
        )

    with pytest.raises(DataError, match=r"train\[2\]  has an answer of padding tokens only"):
        made().train()
    skipping = made(on_bad_row="skip")
    skipping.train()
    report = skipping.data_reports["train"]
    assert (report.used, report.num_skipped) == (3, 1)
    assert skipping.state.log_history[0]["loss"] > 0
    assert caplog.text.count("skipped: train[2]") == 1


def test_long_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    one = trainer("Reward", tmp_path, max_length=40)
    report = one.data_reports["train"]
    assert 0 < report.used < 8
    assert report.used + report.num_skipped == 8
