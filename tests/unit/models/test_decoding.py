"""Token by token, with what was read kept, a model says what it says of the whole sequence at once."""

from __future__ import annotations

import pytest
import torch

from posttrain.models.decoding import Memory
from posttrain.models.forward import Policy, open_policy
from tests.tiny_models import FAMILIES, tiny_model

PROMPTS = [[5, 9, 13, 2, 40, 7], [21, 3, 8]]
ROWS = [(0, [4, 17, 30, 12, 6]), (0, [50, 2, 9]), (1, [11, 12, 13, 14, 15, 16, 17])]
"""Which prompt each goes on from, and with what."""


def forward(policy: Policy, ids: list[int], positions: torch.Tensor, layout: object) -> torch.Tensor:
    """Logits `(tokens, V)`."""
    hidden = policy.base.base_model(
        input_ids=torch.tensor([ids]), position_ids=positions[None], attention_mask=torch.empty(1, 1, 0, 0),
        layout=layout, use_cache=False,
    ).last_hidden_state[0]  # fmt: skip
    return policy.base.get_output_embeddings()(hidden)


def opened(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    return open_policy(tiny_model(family).to(dtype).eval())


def read(policy: Policy, memory: Memory) -> None:
    lengths = [len(prompt) for prompt in PROMPTS]
    flat = [token for prompt in PROMPTS for token in prompt]
    forward(policy, flat, torch.cat([torch.arange(n) for n in lengths]), memory.reading(lengths, [0, 1]))


def decoded(policy: Policy, memory: Memory, rows: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
    """Logits after each own token of each row; rows that have no more leave."""
    for prompt in sorted({prompt for prompt, _ in rows}):
        memory.admit(prompt, sum(other == prompt for other, _ in rows))
    alive, said, step = list(range(len(rows))), [[] for _ in rows], 0
    while alive:
        ids = [rows[row][1][step] for row in alive]
        logits = forward(policy, ids, memory.positions(), memory)
        memory.advance()
        step += 1
        for row, one in zip(alive, logits, strict=True):
            said[row].append(one)
        stay = [place for place, row in enumerate(alive) if len(rows[row][1]) > step]
        if len(stay) < len(alive):
            memory.keep(stay)
            alive = [alive[place] for place in stay]
    return [torch.stack(one) for one in said]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_as_the_whole_sequence(family: str) -> None:
    policy = opened(family)
    memory = Memory(room=8)
    read(policy, memory)
    for (prompt, own), made in zip(ROWS, decoded(policy, memory, ROWS), strict=True):
        whole = policy.base(input_ids=torch.tensor([PROMPTS[prompt] + own])).logits[0, len(PROMPTS[prompt]) :]
        torch.testing.assert_close(made, whole, rtol=1e-4, atol=1e-5)
