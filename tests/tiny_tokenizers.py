"""Small byte-level BPE tokenizers, trained on the spot on a few sentences."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "The capital of France is Paris.",
    "What is two plus two? Two plus two is four.",
    "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\nHello, how can I help you?<|im_end|>\n",
    "system user assistant tool function call name arguments",
    "A list of numbers: 1, 2, 3, 10, 25, 100.",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@lru_cache
def _trained(extra: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())


def plain_tokenizer(
    bos: bool = False, eos: bool = False, extra: tuple[str, ...] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """Without a chat template. `bos` and `eos` have the tokenizer itself add these tokens; `extra` are more special
    tokens."""
    tokenizer = Tokenizer.from_str(_trained(extra))
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=extra,
    )
    wrapped.chat_template = template
    return wrapped


def chatml_tokenizer(bos: bool = False, marked: bool = False) -> PreTrainedTokenizerFast:
    """With a ChatML template, whose end of turn is the end-of-sequence token; `marked` adds generation markers."""
    tokenizer = plain_tokenizer(bos=bos, template=CHATML_MARKED if marked else CHATML)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer
