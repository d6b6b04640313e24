import json
from functools import cache, partial
from pathlib import Path
from typing import Any
import datasets, trl, posttrain
import numpy as np
import peft
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments, EarlyStoppingCallback, AutoModelForCausalLM
from tests.parity.side_by_side import *
from tests.parity.side_by_side import as_dataset
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import *
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

EVAL = CHAT_PAIRS[::-1][:5]
ev = lambda **kw: (lambda: {"eval_dataset": as_dataset(EVAL), **kw})
def test_eval(tmp_path):
    check(tmp_path, CHAT_PAIRS, given=ev(), eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, max_steps=4)
def test_eval_even(tmp_path):
    check(tmp_path, TOKENS, given=lambda: {"eval_dataset": as_dataset(TOKENS[:7])}, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, max_steps=4)
def test_eval_epoch(tmp_path):
    check(tmp_path, CHAT_PAIRS, given=ev(), eval_strategy="epoch", per_device_eval_batch_size=8, num_train_epochs=2,  per_device_train_batch_size=3, eval_on_start=True)
def test_eval_delay(tmp_path):
    check(tmp_path, CHAT_PAIRS, given=ev(), eval_strategy="steps", eval_delay=3, eval_steps=1, per_device_eval_batch_size=8, num_train_epochs=2,  per_device_train_batch_size=3)
def test_eval_dict(tmp_path):
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, given=lambda: {"eval_dataset": {"a": as_dataset(EVAL), "b": as_dataset(CHAT_PAIRS[:2])}}, eval_strategy="steps", eval_steps=1)
    assert_same(ours, theirs)
def test_eval_packing(tmp_path):
    check(tmp_path, CHAT_PAIRS, given=ev(), eval_strategy="steps", eval_steps=1, packing=True, max_length=80, per_device_train_batch_size=9)
    check(tmp_path, CHAT_PAIRS, given=ev(), eval_strategy="steps", eval_steps=1, packing=True, eval_packing=False, max_length=80, per_device_train_batch_size=9)

def test_evaluate(tmp_path):
    o, t = [trainer_of(l, tmp_path/l.__name__, CHAT_PAIRS, given=ev()) for l in (posttrain, trl)]
    for when in ["before", "after"]:
        a, b = o.evaluate(), t.evaluate()
        print(a, b)
        for k in b:
            if not TIMES.search(k): assert a[k] == near(b[k]), k
        a, b = o.evaluate(as_dataset(CHATS), metric_key_prefix="test"), t.evaluate(as_dataset(CHATS), metric_key_prefix="test")
        print(a, b)
        for k in b:
            if not TIMES.search(k): assert a[k] == near(b[k]), k
        if when == "before": o.train(); t.train()

def metrics(p):
    labels = p.label_ids; pr = np.argmax(p.predictions, -1) if p.predictions.ndim == 3 else p.predictions
    ok = (pr[:, :-1] == labels[:, 1:]) & (labels[:, 1:] != -100)
    return {"acc": ok.sum() / (labels[:, 1:] != -100).sum(), "mean": float(np.mean(p.predictions)), "shape": float(p.predictions.shape[1]), "n": len(p.predictions)}
@pytest.mark.parametrize("pre", [None, lambda logits, labels: logits.argmax(-1), lambda logits, labels: logits[..., :7]])
@pytest.mark.parametrize("more", [{}, {"eval_accumulation_steps": 1}])
def test_metrics(pre, more, tmp_path):
    check(tmp_path, CHAT_PAIRS, given=ev(compute_metrics=metrics, preprocess_logits_for_metrics=pre), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=5, **more)
@pytest.mark.parametrize("pre", [None, lambda logits, labels: logits.argmax(-1)])
def test_metrics2(pre, tmp_path):
    o,t = train_both(tmp_path, CHAT_PAIRS, given=ev(compute_metrics=metrics, preprocess_logits_for_metrics=pre), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    assert_same(o, t, leaving_out=["eval_entropy", "eval_mean_token_accuracy"])
def test_metrics_inc(tmp_path):
    seen = []
    def m(p):
        seen.append((p.inputs, p.losses)); return {}
    o,t = train_both(tmp_path, CHAT_PAIRS, given=ev(compute_metrics=m), eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=2, include_for_metrics=["inputs", "loss"])
    assert (seen[0][0] == seen[1][0]).all(), (seen[0][0].shape, seen[1][0].shape)
    assert seen[0][1] == near(seen[1][1])

class Recorder(TrainerCallback):
    def __init__(self): self.events = []
for name in [n for n in dir(TrainerCallback) if n.startswith("on_")]:
    def f(self, args, state, control, name=name, **kw):
        extra = sorted(k for k in (kw.get("logs") or kw.get("metrics") or {}) ) 
        self.events.append((name, state.global_step, state.epoch, state.max_steps, state.num_train_epochs, control.should_log, control.should_save, control.should_evaluate, control.should_epoch_stop, control.should_training_stop, ))
    setattr(Recorder, name, f)
E2 = [dict(), dict(eval_strategy="steps", eval_steps=2, max_steps=5, save_strategy="steps", save_steps=2, logging_steps=2, per_device_train_batch_size=2),
 dict(eval_strategy="epoch", num_train_epochs=2, save_strategy="epoch", logging_strategy="epoch", per_device_train_batch_size=2, eval_on_start=True),
 dict(eval_strategy="epoch", num_train_epochs=2, save_strategy="best", metric_for_best_model="loss", logging_strategy="epoch", per_device_train_batch_size=2),
 dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2),
 dict(per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, num_train_epochs=1),
 dict(per_device_train_batch_size=2, num_train_epochs=1.4, save_strategy="steps", save_steps=4),
 ]
@pytest.mark.parametrize("e", E2, ids=map(str,E2))
def test_events(e, tmp_path):
    rec = []
    def given():
        rec.append(Recorder()); return {"callbacks": [rec[-1]], "eval_dataset": as_dataset(EVAL)}
    train_both(tmp_path, CHAT_PAIRS, given=given, **e)
    a, b = [[x for x in r.events] for r in rec]
    assert a == b
def test_events_dict(tmp_path):
    rec = []
    def given():
        rec.append(Recorder()); return {"callbacks": [rec[-1]], "eval_dataset": {"a": as_dataset(EVAL), "b":as_dataset(EVAL)}}
    train_both(tmp_path, CHAT_PAIRS, given=given, eval_strategy="steps", eval_steps=3)
    a, b = [[x for x in r.events] for r in rec]
    assert a == b
def test_plain_args(tmp_path):
    def given(): return {"args": TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", logging_steps=1, per_device_train_batch_size=6, save_strategy="no", disable_tqdm=True, lr_scheduler_kwargs={})}
    check(tmp_path, CHAT_PAIRS, given=given)

@pytest.mark.parametrize("lora", [0, 1])
def test_best(lora, tmp_path):
    p = {"peft_config": peft.LoraConfig(r=4,target_modules="all-linear")} if lora else {}
    o,t = train_both(tmp_path, CHAT_PAIRS, given=ev(callbacks=[EarlyStoppingCallback(2)], **p), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, max_steps=14, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant",per_device_train_batch_size=2, per_device_eval_batch_size=5)
    assert_same(o, t)
    assert o.trainer.state.global_step < 14
    assert o.trainer.state.best_global_step == t.trainer.state.best_global_step
    assert o.trainer.state.best_metric == near(t.trainer.state.best_metric)
    for (n, a), (m, b) in zip(o.trainer.model.named_parameters(), t.trainer.model.named_parameters(), strict=True):
        assert n == m
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for l in ("posttrain", "trl"): print(sorted(x.name for x in (tmp_path/l).iterdir()))
    s = [json.loads((tmp_path/l/f"checkpoint-{o.trainer.state.best_global_step}"/"trainer_state.json").read_text()) for l in ("posttrain", "trl")]
    assert s[1].keys() <= s[0].keys()
    for k in s[1]:
        print(k, s[0][k] if k != "log_history" else "", s[1][k] if k != "log_history" else "")
    print([sorted(p.name for p in (tmp_path/l/f"checkpoint-{o.trainer.state.best_global_step}").iterdir()) for l in ("posttrain", "trl")])
    print(o.result, t.result)
    assert 0
