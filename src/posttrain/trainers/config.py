"""Settings: transformers' `TrainingArguments` with the fields of TRL 1.16's, and a few of ours.

Same names, same parsing, same values, with three differences, none of which changes a number: gradient checkpointing is
off unless asked for (packed batches rarely need it), bf16 is chosen where the hardware has it, and a machine without an
accelerator needs no `use_cpu=True`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.training_args import trainer_log_levels

from posttrain.errors import ConfigError, UnknownArgumentError
from posttrain.models.available import parse_size
from posttrain.models.precision import has_fast_bf16
from posttrain.models.recomputation import LEVELS
from posttrain.trainers.arguments import REFUSED
from posttrain.trainers.spellings import modern_config
from posttrain.trainers.values import check_values


def accepts_old_spellings(config_class: type) -> type:
    """Let a config class take yesterday's keyword arguments: everybody's, and those of its own `SPELLINGS`. What is no
    keyword argument of any day is an UnknownArgumentError."""
    original = config_class.__init__  # type: ignore[misc]
    known = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        modern = modern_config(kwargs, getattr(config_class, "SPELLINGS", {}))
        for name in modern:
            if name not in known:
                raise UnknownArgumentError(config_class.__name__, name, known)
        original(self, *args, **modern)

    config_class.__init__ = init  # type: ignore[misc]
    return config_class


@dataclass
class PackedConfig(TrainingArguments):
    """What the settings of all methods share. Fields not listed here are transformers' own.

    Raises: ConfigError for a setting that is not honoured, naming it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "dataset_columns",
    ]
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "truncation_mode": ("keep_start", "keep_end"),
        "on_bad_row": ("error", "skip"),
        "recompute": ("auto", *LEVELS),
        "log_level": tuple(trainer_log_levels),
    }

    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines; below 1: a share of all."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16 with fp32 masters. Default: where the hardware does."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained, for a model given by name."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Refused: code from the hub is never run."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Balancing loss of mixtures of experts; only 0.0 is supported."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to use: a name (chatml, llama-3.1, ...), a .jinja file, or a tokenizer that has one."
        },
    )
    dataset_columns: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": 'Columns to rename, old to new: {"question": "prompt", "answer": "completion"}.'},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Accepted; tokenization runs in the tokenizer's own threads."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest sequence in tokens; None for no limit. With packing, a pack's size."}
    )
    truncation_mode: str = field(default="keep_start", metadata={"help": "Which end of a long sequence is kept."})
    padding_free: bool = field(default=False, metadata={"help": "Accepted; nothing is ever padded."})
    pad_to_multiple_of: int | str | None = field(default="auto", metadata={"help": "Accepted; nothing is padded."})
    activation_offloading: bool = field(default=False, metadata={"help": "Not supported: activations stay in memory."})
    pad_token: str | None = field(default=None, metadata={"help": "Padding token to set on the tokenizer."})
    token_budget: int | None = field(
        default=None,
        metadata={"help": "Most tokens in one forward. Default: as memory allows. Never changes the result."},
    )
    max_memory: str | None = field(
        default=None,
        metadata={"help": "Memory that training may use, such as '12GiB'. Default: 90 % of what is there."},
    )
    recompute: str = field(
        default="auto",
        metadata={"help": "Activations made again in the backward pass: 'none', 'selective', 'full', or the least that "
                  "fits ('auto'). gradient_checkpointing=True means 'full'."},
    )  # fmt: skip
    dataset_format: str = field(default="auto", metadata={"help": "Name of the rows' format; 'auto' asks each row."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read training files as training goes, for what does not fit in memory."}
    )
    dataset_cache: bool = field(
        default=True, metadata={"help": "Keep tokens of files in ~/.cache/posttrain (or $POSTTRAIN_CACHE)."}
    )
    on_bad_row: str = field(default="error", metadata={"help": "'error', or 'skip' (counted and reported)."})

    def __post_init__(self) -> None:
        if getattr(self, "output_dir", None) is None:
            self.output_dir: str | None = "trainer_output"
        check_values(self)
        if not self.output_dir:
            raise ConfigError("output_dir is empty", hint="checkpoints and logs go there")
        if self.deepspeed:
            raise ConfigError(f"deepspeed={self.deepspeed!r} is not honoured: {REFUSED['deepspeed']}")
        has_accelerator = torch.accelerator.is_available()
        if not has_accelerator:
            self.use_cpu = True
        if self.bf16 is None:
            device = torch.device("cpu" if self.use_cpu else "cuda")
            self.bf16 = not self.fp16 and has_fast_bf16(device)
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = None
        with warnings.catch_warnings():  # both spellings of checkpointing are fine here
            warnings.simplefilter("ignore", FutureWarning)
            try:
                super().__post_init__()
            except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, OSError) as error:
                raise ConfigError(f"training settings do not fit together: {error}") from error
        self._read_spellings()
        self._check_choices()

    def _read_spellings(self) -> None:
        """Yesterday's words for today's values."""

    def _check_choices(self) -> None:
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown", hint=f"choose one of {choices}")
        if self.max_memory is not None:
            parse_size(self.max_memory)
        for name in ("trust_remote_code", "activation_offloading"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name}=True is not honoured: {type(self).__dataclass_fields__[name].metadata['help']}"
                )
        if self.include_num_input_tokens_seen not in (True, False, "all", "non_padding", "no"):
            raise ConfigError(f"include_num_input_tokens_seen={self.include_num_input_tokens_seen!r} is unknown",
                              hint="choose 'all', 'non_padding' or 'no'")  # fmt: skip


@accepts_old_spellings
@dataclass
class SFTConfig(PackedConfig):
    """Settings of supervised fine-tuning."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*PackedConfig._VALID_DICT_FIELDS, "dataset_kwargs"]
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss_type": ("nll", "dft"),
        "packing_strategy": ("bfd", "bfd_split", "wrapped"),
        **PackedConfig.CHOICES,
    }

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate; LoRA wants about 2e-4."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds plain text."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Only `skip_prepare_dataset`: the rows are tokenized (input_ids, labels)."}
    )
    eos_token: str | None = field(default=None, metadata={"help": "End-of-sequence token to use."})
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle once before packing and training."})
    packing: bool = field(default=False, metadata={"help": "Let batch size count packs of up to max_length tokens."})
    packing_strategy: str = field(default="bfd", metadata={"help": "'bfd', 'bfd_split' or 'wrapped'."})
    eval_packing: bool | None = field(default=None, metadata={"help": "Pack the evaluation set; default: as packing."})
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Train on completions only. Default: yes where rows have a prompt."}
    )
    assistant_only_loss: bool | None = field(
        default=False,
        metadata={"help": "Train on the assistant's turns only. None: of rows that are whole conversations."},
    )
    loss_type: str = field(default="nll", metadata={"help": "'nll' or 'dft'."})

    def _read_spellings(self) -> None:
        self.loss_type = {"chunked_nll": "nll"}.get(self.loss_type, self.loss_type)
        self.packing_strategy = {"bfd-requeue": "bfd_split"}.get(self.packing_strategy, self.packing_strategy)

    def _check_choices(self) -> None:
        super()._check_choices()
        if self.padding_free and not self.packing and self.max_length is not None:
            # TRL refuses this pair; here both can be had, and nothing is padded in any case.
            self.padding_free = False
        if set(self.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
            raise ConfigError(
                f"dataset_kwargs={self.dataset_kwargs} is not honoured: only skip_prepare_dataset is known"
            )
