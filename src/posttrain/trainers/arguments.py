"""Every field of transformers' `TrainingArguments`: honoured, harmless, or refused by name.

A field that is refused and set away from its default raises; a harmless one that is set prints why it is not needed. A
test fails when transformers adds a field that stands in none of the tables.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from transformers import TrainingArguments

from posttrain.errors import ConfigError

logger = logging.getLogger("posttrain")

HONOURED = frozenset((
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "optim_target_modules", "gradient_accumulation_steps", "max_grad_norm",
    "label_smoothing_factor", "bf16", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "neftune_noise_alpha", "logging_strategy",
    "logging_steps", "logging_first_step", "include_num_input_tokens_seen", "log_level", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only",
    "eval_on_start", "eval_do_concat_batches", "eval_accumulation_steps", "include_for_metrics",
    "batch_eval_metrics", "save_only_model", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "full_determinism", "seed", "data_seed",
    "use_cpu", "dataloader_drop_last", "train_sampling_strategy",
))  # fmt: skip

# Cannot change any number here; what each is for happens anyway or has no counterpart.
HARMLESS = {
    "average_tokens_across_devices": "losses are always divided by the tokens of the whole step",
    "logging_nan_inf_filter": "a non-finite loss stops the run instead of being averaged away",
    "restore_callback_states_from_checkpoint": "callbacks are always restored",
    "enable_jit_checkpoint": "a signal always saves first",
    "use_cache": "training forwards never cache keys and values",
    "remove_unused_columns": "columns stay with their rows and reach no model",
    "use_liger_kernel": "logits are never materialised anyway",
    "liger_kernel_config": "logits are never materialised anyway",
    "torch_empty_cache_steps": "memory is planned, and given back where it is short",
    "auto_find_batch_size": "batch size is statistics here; how much is computed at once is found by itself",
    "length_column_name": "lengths are known from the tokens",
    "log_on_each_node": "there is one process",
    "log_level_replica": "there is one process",
    "save_on_each_node": "there is one process",
    "eval_use_gather_object": "there is one process",
    "local_rank": "there is one process",
    "ddp_find_unused_parameters": "there is one process",
    "ddp_bucket_cap_mb": "there is one process",
    "ddp_broadcast_buffers": "there is one process",
    "ddp_static_graph": "there is one process",
    "ddp_backend": "there is one process",
    "ddp_timeout": "there is one process",
    "accelerator_config": "there is one process",
    "dataloader_num_workers": "batches are laid out in the training process, from tokens in memory",
    "dataloader_pin_memory": "batches are laid out in the training process, from tokens in memory",
    "dataloader_persistent_workers": "batches are laid out in the training process, from tokens in memory",
    "dataloader_prefetch_factor": "batches are laid out in the training process, from tokens in memory",
    "dataloader_multiprocessing_context": "batches are laid out in the training process, from tokens in memory",
    "dataloader_in_order": "batches are laid out in the training process, from tokens in memory",
    "do_train": "it is for scripts to read",
    "do_eval": "it is for scripts to read",
    "do_predict": "it is for scripts to read",
    "resume_from_checkpoint": "it is for scripts to read: pass it to train(resume_from_checkpoint=...)",
    "hub_token": "it matters with push_to_hub only",
    "hub_private_repo": "it matters with push_to_hub only",
    "hub_model_id": "it matters with push_to_hub only",
    "hub_strategy": "it matters with push_to_hub only",
    "hub_always_push": "it matters with push_to_hub only",
    "hub_revision": "it matters with push_to_hub only",
}
# Set by transformers itself or part of nearly every script; a note about them would be noise.
_SILENT = frozenset(("remove_unused_columns", "do_train", "do_eval", "do_predict", "local_rank", "accelerator_config",
                     "hub_token", "dataloader_pin_memory"))  # fmt: skip

REFUSED = {
    "fp16": "half precision with loss scaling is not supported; use bf16=True, or fp32 with bf16=False",
    "fp16_full_eval": "evaluation runs in the dtype of training",
    "bf16_full_eval": "evaluation runs in the dtype of training; set bf16",
    "torch_compile": "the engine does not compile models yet",
    "torch_compile_backend": "the engine does not compile models yet",
    "torch_compile_mode": "the engine does not compile models yet",
    "push_to_hub": "push when it is done: trainer.model.push_to_hub(...)",
    "ignore_data_skip": "a resumed run always continues where it stopped",
    "parallelism_config": "the engine runs in one process for now",
    "fsdp": "the engine runs in one process for now",
    "fsdp_config": "the engine runs in one process for now",
    "deepspeed": "the engine runs in one process for now",
    "debug": "posttrain names the rows of a non-finite loss itself",
    "skip_memory_metrics": "peak memory is logged as peak_memory_gib",
    "label_names": "labels are the dataset's `labels` column",
}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what is not honoured, say what is not needed. Raises ConfigError naming the field and the way out."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(TrainingArguments)}
    for name in REFUSED:
        value = getattr(args, name)
        if not _same(value, defaults[name]):
            raise ConfigError(f"{name}={value!r} is not honoured: {REFUSED[name]}")
    for name, reason in HARMLESS.items():
        if name not in _SILENT and not _same(getattr(args, name), defaults[name]):
            logger.info("%s is not needed: %s", name, reason)
    if args.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
        raise ConfigError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not honoured",
            hint="use 'random', 'sequential' or 'group_by_length'",
        )
    if args.world_size > 1:
        raise ConfigError(f"launched with {args.world_size} processes: the engine runs in one process for now")


def _same(value: Any, default: Any) -> bool:
    empty: tuple[Any, ...] = (None, "", [], {}, False)
    return value == default or (value in empty and default in empty)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
