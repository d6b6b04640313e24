from functools import cache, partial
from pathlib import Path
from typing import Any
import datasets, trl, posttrain
import peft
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from tests.parity.side_by_side import *
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import *
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing(family, strategy, tmp_path):
    check(tmp_path, CHAT_PAIRS, model=family, packing=True, max_length=70, packing_strategy=strategy, per_device_train_batch_size=9)

O = [dict(weight_decay=0.3), *[dict(optim=o) for o in ["adamw_torch","adamw_torch_fused","sgd","adafactor","rmsprop","adagrad"]],
  dict(optim="adamw_torch", optim_args="amsgrad=True"), dict(optim="sgd", optim_args="momentum=0.9"), dict(adam_beta1=.5, adam_beta2=.6, adam_epsilon=1e-3),
  dict(optim="sgd", weight_decay=0.3, learning_rate=0.1),
  dict(max_grad_norm=0), dict(max_grad_norm=0.05, optim="sgd", learning_rate=1.0), dict(max_grad_norm=0., optim="sgd", learning_rate=0.1),
  dict(learning_rate=1e-3),
  *[dict(lr_scheduler_type=s, warmup_steps=1, max_steps=4) for s in ["linear","cosine","cosine_with_restarts","polynomial","constant","constant_with_warmup","inverse_sqrt"]],
  dict(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles":2}, max_steps=5),
  dict(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power":2, "lr_end":1e-3}, max_steps=5),
  dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr":1e-3}, max_steps=5),
  dict(lr_scheduler_type="cosine_warmup_with_min_lr", lr_scheduler_kwargs={"min_lr":1e-3}, warmup_steps=2, max_steps=5),
  dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps":2}, warmup_steps=1, max_steps=5),
  dict(lr_scheduler_type="linear", warmup_steps=0.5, max_steps=5),
]
@pytest.mark.parametrize("o", O, ids=[str(o) for o in O])
def test_opt(o, tmp_path):
    check(tmp_path, CHAT_PAIRS, **o)

def test_wd_lora(tmp_path):
    check(tmp_path, CHAT_PAIRS, weight_decay=0.5, given=lambda: dict(peft_config=peft.LoraConfig(r=4,target_modules="all-linear", modules_to_save=["lm_head"])))

S = [dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3),
 dict(per_device_train_batch_size=4, num_train_epochs=2),
 dict(per_device_train_batch_size=4, num_train_epochs=2, dataloader_drop_last=True),
 dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=2, dataloader_drop_last=True),
 dict(per_device_train_batch_size=3, gradient_accumulation_steps=4, num_train_epochs=1.5),
 dict(per_device_train_batch_size=2, data_seed=7, max_steps=8),
 dict(per_device_train_batch_size=2, seed=7, max_steps=8),
 dict(per_device_train_batch_size=2, train_sampling_strategy="sequential", max_steps=8),
 dict(per_device_train_batch_size=2, logging_steps=2, logging_first_step=True, max_steps=7),
 dict(per_device_train_batch_size=2, logging_steps=3, max_steps=8),
 dict(per_device_train_batch_size=2, logging_steps=0.3, max_steps=8),
 dict(per_device_train_batch_size=2, logging_strategy="epoch", num_train_epochs=2),
 dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, logging_strategy="epoch", num_train_epochs=2),
 dict(per_device_train_batch_size=2, num_train_epochs=0.5),
 dict(per_device_train_batch_size=2, num_train_epochs=1.3),
]
@pytest.mark.parametrize("rows", ["even", "uneven"])
@pytest.mark.parametrize("s", S, ids=[str(o) for o in S])
def test_steps(s, rows, tmp_path):
    rows = {"even": TOKENS, "uneven": CHAT_PAIRS}[rows]
    ours, theirs = train_both(tmp_path, rows, **s)
    assert_same(ours, theirs, leaving_out=AVERAGES if rows is CHAT_PAIRS else ())
    assert ours.result.training_loss == near(theirs.result.training_loss)
    if rows is TOKENS: assert_same(ours, theirs)

class Reseed(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)
@pytest.mark.parametrize("l", [0,1])
def test_neftune(tmp_path, l):
    p = {"peft_config": peft.LoraConfig(r=4,target_modules="all-linear")} if l else {}
    check(tmp_path, TOKENS, neftune_noise_alpha=5., given=lambda: {"callbacks": [Reseed()], **p})

@pytest.mark.parametrize("n", [3, 8])
def test_stream(n, tmp_path):
    s = datasets.Dataset.from_list(CHAT_PAIRS).to_iterable_dataset()
    ours, theirs = train_both(tmp_path, s, max_steps=n, per_device_train_batch_size=2)
    assert_same(ours, theirs)

def test_budget(tmp_path):
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, ours_alone={"token_budget": 40})
    assert_same(ours, theirs)
