"""Which model is the reference: never the policy, never what another run asked, and the same after resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from posttrain import CheckpointError, ConfigError, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from posttrain.models import forward
from posttrain.models.attention import PACKED_ATTENTION
from posttrain.models.scoring import as_classifier
from posttrain.snapshot import _differ
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i} plus two? ", "chosen": f"It is {i + 2}.", "rejected": f"No idea, {i}."} for i in range(8)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def model(seed: int = 0) -> Any:
    return tiny_model("llama", len(chatml_tokenizer()), seed=seed)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(folder: Path, made: Any = None, ref: Any = None, *, peft: Any = None, rows: Any = ROWS,
            eval_rows: Any = None, **options: Any) -> DPOTrainer:  # fmt: skip
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    return DPOTrainer(made or model(), ref, DPOConfig(str(folder), **settings), train_dataset=rows,
                      eval_dataset=eval_rows, processing_class=chatml_tokenizer(), peft_config=peft)  # fmt: skip


def first(one: DPOTrainer, name: str) -> float:
    return next(float(entry[name]) for entry in one.state.log_history if name in entry)


# --- references that could not serve ------------------------------------------------------------------------------


def test_the_adapter_that_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it would follow the policy"):
        trainer(tmp_path, get_peft_model(model(), lora()), ref_adapter_name="default")


def test_the_layers_that_are_trained(tmp_path: Path) -> None:
    base = model()
    made = get_peft_model(base, lora())
    with pytest.raises(ConfigError, match="has layers of the model that is trained"):
        trainer(tmp_path, made, base)
    assert any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (lambda: tiny_model("llama", 60), "ref_model embeddings for 60 tokens only"),
        (lambda: as_classifier(model(1)), "LlamaForSequenceClassification, which gives tokens no probabilities"),
        (lambda: few_places(), "tokens, ref_model 9 places"),
    ],
    ids=["few tokens", "a reward model", "few places"],
)
def test_models_that_cannot_read_the_rows(ref: Any, message: str, ahead: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, None, ref(), precompute_ref_log_probs=ahead)


def test_a_model_that_does_not_share_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = model(1)
    shares = forward._shares_prompts
    monkeypatch.setattr(forward, "_shares_prompts", lambda policy: policy.model is not ref and shares(policy))
    one = trainer(tmp_path, ref=ref)
    with pytest.raises(ConfigError, match=r"ref_model \(LlamaForCausalLM\) does not honour shared prompts"):
        one.train()


def few_places() -> Any:
    config = GPT2Config(vocab_size=len(chatml_tokenizer()), n_embd=32, n_layer=1, n_head=4, n_positions=9)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_adapter_that_is_not_there(adapted: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ref_adapter_name='ref' is no adapter of the model"):
        trainer(tmp_path, get_peft_model(model(), lora()) if adapted else None, ref_adapter_name="ref")


@pytest.mark.parametrize(
    "options",
    [{"precompute_ref_log_probs": True}, {"sync_ref_model": True}, {"ref_adapter_name": "a"}, {"ref": model(1)}],
)
def test_losses_that_ask_no_reference(options: dict[str, Any], tmp_path: Path) -> None:
    name = "ref_model" if "ref" in options else next(iter(options))
    with pytest.raises(ConfigError, match=f"{name} is not honoured with loss_type"):
        trainer(tmp_path, loss_type="simpo", beta=2.0, **options)


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"beta": 0.3}, "settings of the loss"),
        ({"label_smoothing": 0.2, "loss_type": "robust"}, "loss_type"),
        ({"ld_alpha": 0.5}, "settings of the loss"),
        ({"use_weighting": True}, "settings of the loss"),
        ({"made": model(1)}, "reference"),
        ({"ref": model(1)}, "reference"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": False}, "reference"),
    ],
)
def test_another_loss_or_reference_is_another_run(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    options = {"precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **options).train()
    with pytest.raises(CheckpointError, match=named):
        trainer(tmp_path, **{**options, **changed}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("ahead", [False, True])
def test_the_checkpoint_itself_is_no_reference(ahead: bool, tmp_path: Path) -> None:
    """`model=checkpoint` and `resume_from_checkpoint=checkpoint` together would have the reference begin half-way."""
    from transformers import AutoModelForCausalLM

    options = {"precompute_ref_log_probs": ahead, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **options).train()
    half_way = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="reference"):
        trainer(tmp_path, half_way, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("adapted", [False, True])
def test_another_model_given_as_reference_is_another_run(adapted: bool, tmp_path: Path) -> None:
    options = {"peft": lora() if adapted else None, "precompute_ref_log_probs": False, "save_strategy": "steps",
               "save_steps": 1}  # fmt: skip
    undisturbed = trainer(tmp_path, None, model(5), **options)
    undisturbed.train()
    resumed = trainer(tmp_path, None, model(5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert first(resumed, "loss") == first(undisturbed, "loss")
    with pytest.raises(CheckpointError, match="reference"):
        trainer(tmp_path, None, model(6), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_an_adapter_that_has_no_effect_yet_is_no_part_of_the_reference(
    ahead: bool, targets: list[str], tmp_path: Path
) -> None:
    """What lora_A begins with is random, and another in each process; lora_embedding_B as well."""
    options = {"precompute_ref_log_probs": ahead, "save_strategy": "steps", "save_steps": 1}

    def adapted(seed: int) -> Any:
        made = model()
        torch.manual_seed(seed)
        return get_peft_model(made, LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"]))

    trainer(tmp_path, adapted(1), **options).train()
    kept = len(list((tmp_path / "cache").rglob("*.safetensors")))
    resumed = trainer(tmp_path, adapted(2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert kept == len(list((tmp_path / "cache").rglob("*.safetensors"))) == int(ahead)


def test_an_adapter_whose_name_begins_like_the_references(tmp_path: Path) -> None:
    """It is no part of the reference either."""
    options = {"precompute_ref_log_probs": True, "ref_adapter_name": "ref", "save_strategy": "steps", "save_steps": 1}

    def adapted(seed: int) -> Any:
        torch.manual_seed(0)
        made = get_peft_model(model(), lora(), adapter_name="ref")
        torch.manual_seed(seed)
        made.add_adapter("ref2", lora())
        made.set_adapter("ref2")
        return made

    trainer(tmp_path, adapted(1), **options).train()
    resumed = trainer(tmp_path, adapted(2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", [DPOTrainer, KTOTrainer])
def test_a_model_given_as_reference_is_given_back(
    kind: Any, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was; and it is not open while nothing is asked of it."""
    ref = model(5)
    before = {name: weight.clone() for name, weight in ref.state_dict().items()}
    config_class = DPOConfig if kind is DPOTrainer else KTOConfig
    args = config_class(str(tmp_path), per_device_train_batch_size=4, max_steps=2, bf16=True, save_strategy="steps",
                        save_steps=1, report_to="none", disable_tqdm=True, learning_rate=1e-4,
                        precompute_ref_log_probs=ahead)  # fmt: skip

    class Watch(TrainerCallback):
        is_open: list[bool] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.is_open.append(ref.config._attn_implementation == PACKED_ATTENTION)

    watch = Watch()
    watch.is_open = []

    def made() -> Any:
        return kind(model(), ref, args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[watch],
                    processing_class=chatml_tokenizer())  # fmt: skip

    one = made()
    one.train()
    assert watch.is_open == [not ahead] * 2
    one.evaluate()
    one.evaluate(ROWS[4:])
    assert ref.config._attn_implementation != PACKED_ATTENTION
    assert before.keys() == ref.state_dict().keys()
    for name, weight in ref.state_dict().items():
        assert torch.equal(weight, before[name]), name
    again = made()  # the same object once more, as a script that is run again in a notebook has it
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


def test_what_a_checkpoint_of_before_has_not_heard_of_is_no_difference(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **options).train()
    known = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["identity"]
    settings = known["settings of the loss"][0]
    older = {**known, "settings of the loss": [{k: v for k, v in settings.items() if k != "ld_alpha"}, 0.1]}
    assert not any(_differ(older[name], value) for name, value in known.items())
    other = {**known, "settings of the loss": [{**settings, "ld_alpha": 0.5}, 0.1]}
    assert any(_differ(other[name], value) for name, value in known.items())


def test_the_same_run_however_it_is_written(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, loss_type=("sigmoid", "sft"), loss_weights=(1, 0.5), **options).train()
    resumed = trainer(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


# --- KTO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "warned"), [(4, False), (5, True), (6, False)])
def test_an_answer_alone_in_its_batch(
    count: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}.", "label": i % 2 == 0} for i in range(count)]
    args = KTOConfig(str(tmp_path), per_device_train_batch_size=4, bf16=False, report_to="none")
    KTOTrainer(model(), args=args, train_dataset=rows, processing_class=chatml_tokenizer())
    assert warned == ("is alone in its batch" in caplog.text)


def test_token_ids_are_for_supervised_training(tmp_path: Path) -> None:
    from posttrain import DataError

    rows = [{"input_ids": [1, 2, 3], **row} for row in ROWS]
    with pytest.raises(DataError, match="holds token ids, which supervised training alone reads"):
        trainer(tmp_path, rows=rows)
