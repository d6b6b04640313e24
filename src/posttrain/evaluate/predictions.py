"""`compute_metrics` as transformers calls it: padded batches with full logits, for whoever asks for them.

This is the one place that materialises logits, because the user's function wants to see them; keep the evaluation set
small or reduce the logits with `preprocess_logits_for_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from posttrain.errors import ConfigError
from posttrain.types import Sample


@dataclass(frozen=True)
class Predictor:
    """Calls the user's functions over an evaluation set; a `Run` calls it after the loss."""

    args: TrainingArguments
    compute_metrics: Callable[..., dict[str, float]]
    preprocess_logits: Callable[..., Any] | None = None

    def __call__(self, session: Any, samples: Sequence[Sample], prefix: str) -> dict[str, float]:
        """The user's metrics, their names under `prefix`."""
        if self.args.prediction_loss_only:
            return {}
        kept = {name: EvalLoopContainer(self.args.eval_do_concat_batches, padding_index=-100) for name in
                ("predictions", "label_ids", "inputs", "losses")}  # fmt: skip
        metrics: dict[str, float] = {}
        size, wanted = self.args.per_device_eval_batch_size, self.args.include_for_metrics
        for number, first in enumerate(range(0, len(samples), size), 1):
            last = first + size >= len(samples)
            seen = self._batch(session, samples[first : first + size])
            seen = {name: value for name, value in seen.items() if name in ("predictions", "label_ids") or
                    {"inputs": "inputs", "losses": "loss"}[name] in wanted}  # fmt: skip
            if self.args.batch_eval_metrics:
                metrics = self.compute_metrics(EvalPrediction(**seen), compute_result=last)
                continue
            for name, value in seen.items():
                kept[name].add(value)
            if self.args.eval_accumulation_steps and number % self.args.eval_accumulation_steps == 0:
                for container in kept.values():
                    container.to_cpu_and_numpy()
        if not self.args.batch_eval_metrics:
            metrics = self.compute_metrics(EvalPrediction(**{name: value.get_arrays() for name, value in kept.items()}))
        plain = denumpify_detensorize(metrics)
        return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in plain.items()}

    def _batch(self, session: Any, samples: Sequence[Sample]) -> dict[str, Any]:
        """Logits of one padded batch, labels with -100 where nothing is supervised."""
        base, device = session.policy.base, session.policy.device
        ids, labels = (_padded(rows, fill, device) for rows, fill in _rows(samples, base.config))
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            mask[row, : sum(part.num_tokens for part in sample)] = 1
        logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        logp = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        scored = labels[:, 1:] != -100
        loss = -(logp * scored).sum() / scored.sum().clamp(min=1)
        if self.preprocess_logits is not None:
            logits = self.preprocess_logits(logits, labels)
        return {"predictions": logits, "label_ids": labels, "inputs": ids, "losses": loss.repeat(len(samples))}


def _rows(samples: Sequence[Sample], config: Any) -> list[tuple[list[np.ndarray], int]]:
    ids, labels = [], []
    for sample in samples:
        if len(sample) != 1:
            raise ConfigError(
                "compute_metrics needs one sequence per row, and these are packs", hint="eval_packing=False"
            )
        part = sample[0]
        branch = part.branches[0]
        ids.append(np.concatenate([part.prefix, branch.ids]).astype(np.int64))
        unseen = np.full(len(part.prefix), -100)
        labels.append(np.concatenate([unseen, np.where(branch.supervised, branch.ids, -100)]).astype(np.int64))
    return [(ids, config.get_text_config().pad_token_id or 0), (labels, -100)]


def _padded(rows: list[np.ndarray], fill: int, device: torch.device) -> torch.Tensor:
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded).to(device)
