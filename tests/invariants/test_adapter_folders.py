"""The folder of an adapter in place of a model's: training goes on with it, on the model that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import posttrain
from posttrain import ConfigError
from posttrain.models.load import load_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

CHATS = [{"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
         for i in range(4)]  # fmt: skip
PAIRS = [{"prompt": f"Say {i} ", "chosen": f"{i}!", "rejected": "No."} for i in range(4)]
PROMPTS = [{"prompt": chat["messages"][:1]} for chat in CHATS]
IDS = torch.arange(5, 25)[None]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2,
            "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
            "learning_rate": 1e-2, **more}  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that names its model by folder, too."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    tiny_model("llama", len(chatml_tokenizer())).save_pretrained(tmp_path / "base")
    chatml_tokenizer().save_pretrained(tmp_path / "base")
    trainer = posttrain.SFTTrainer(
        model=str(tmp_path / "base"), args=posttrain.SFTConfig(**settings(tmp_path / "sft")), train_dataset=CHATS,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def make(method: str, model: str, folder: Path, **more: Any) -> Any:
    rewards = {"reward_funcs": lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]}
    given = {"train_dataset": {"SFT": CHATS, "DPO": PAIRS, "GRPO": PROMPTS}[method]}
    own = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1} if method == "GRPO" else {}
    args = getattr(posttrain, f"{method}Config")(**settings(folder, **own))
    return getattr(posttrain, f"{method}Trainer")(
        model=model, args=args, **given, **(rewards if method == "GRPO" else {}), **more
    )


@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO"])
def test_training_goes_on_with_it(method: str, adapter: Path, tmp_path: Path) -> None:
    before = said(PeftModel.from_pretrained(load_model(str(tmp_path / "base")), adapter))
    assert not torch.allclose(before, said(load_model(str(tmp_path / "base"))))
    trainer = make(method, str(adapter), tmp_path / "more")
    assert isinstance(trainer.model, PeftModel)
    assert torch.equal(said(trainer.model), before)
    trainer.train()
    if method != "SFT":
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert first.get("rewards/margins", first.get("kl")) == pytest.approx(0.0, abs=1e-6)  # it is the reference too
    after = said(trainer.model)
    assert not torch.allclose(after, before)
    trainer.save_model(str(tmp_path / "next"))
    again = PeftModel.from_pretrained(load_model(str(tmp_path / "base")), tmp_path / "next")
    assert torch.allclose(said(again), after, atol=1e-5)


@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO"])
def test_not_with_another(method: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has an adapter already and peft_config asks for another"):
        make(method, str(adapter), tmp_path / "more", peft_config=LoraConfig(r=2, target_modules=["k_proj"]))


def test_one_that_transformers_has_put_into_a_model(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    injected = AutoModelForCausalLM.from_pretrained(adapter)
    with pytest.raises(ConfigError, match="has an adapter already and peft_config asks for another"):
        make("SFT", injected, tmp_path, peft_config=LoraConfig(r=2), processing_class=chatml_tokenizer())


def test_where_a_model_is_wanted(adapter: Path, tmp_path: Path) -> None:
    args = posttrain.RewardConfig(**settings(tmp_path / "reward"))
    with pytest.raises(ConfigError, match="is an adapter, not a model"):
        posttrain.RewardTrainer(str(adapter), args, train_dataset=PAIRS)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_of_another_model(suffix: str, adapter: Path, tmp_path: Path) -> None:
    """PEFT would begin with an adapter that changes nothing."""
    path = adapter / "adapter_model.safetensors"
    renamed = {name.replace("layers", "blocks"): tensor for name, tensor in load_file(path).items()}
    if suffix == "safetensors":
        save_file(renamed, path, {"format": "pt"})
    else:
        path.unlink()
        torch.save(renamed, adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be put on .*: .*[Mm]issing adapter keys"):
        make("SFT", str(adapter), tmp_path / "more")


def test_tokens_that_it_would_not_learn(adapter: Path, tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "words")
    args = posttrain.SFTConfig(**settings(tmp_path / "more", chat_template_path=str(tmp_path / "words")))
    with pytest.raises(ConfigError, match=r"adds .* tokens, which the adapter would leave as random"):
        posttrain.SFTTrainer(str(adapter), args, train_dataset=CHATS)


def test_rows_that_nothing_says_are_no_reason(adapter: Path, tmp_path: Path) -> None:
    """Embeddings are filled up to a multiple of 64."""
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path / "words")
    args = posttrain.SFTConfig(**settings(tmp_path / "more", chat_template_path=str(tmp_path / "words")))
    trainer = posttrain.SFTTrainer(str(adapter), args, train_dataset=CHATS)
    assert trainer.model.get_input_embeddings().weight.shape[0] % 64 == 0
    trainer.train()


def test_a_folder_that_is_broken(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors cannot be read"):
        make("SFT", str(adapter), tmp_path / "more")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no configuration of an adapter"):
        make("SFT", str(adapter), tmp_path / "more")
