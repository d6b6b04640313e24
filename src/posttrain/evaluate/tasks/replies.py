"""A task for reward models and PPO: replies to customers. A good one calls the customer who asked by name and says the
order's own number; a bad one gets one of the two wrong, or says what a small instruct model says of itself.

    "My name is Anna. Where is my parcel? My order is 4312."
    good  "Dear Anna, about order 4312: it is on its way."
    bad   "Dear Jonas, about order 4312: it is on its way."

No program could judge every reply a model may give; a reward model trained on such pairs can, and held-out pairs say
how well.
"""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]

NAMES = ("Anna", "Bashir", "Chen", "Dora", "Emeka", "Farah", "Goran", "Hana", "Iris", "Jonas", "Kofi", "Lena")
WISHES = ("where is my parcel", "can I send it back", "how long will it take", "may I change the address")
ANSWERS = ("we are looking into it and will write today", "it is on its way", "of course, the form is attached",
           "thank you for your patience")  # fmt: skip
SAID = (
    "Dear {name}, about order {order}: {answer}.",
    "Hello {name}, I have your order {order} before me: {answer}.",
    "I'm sorry to hear that, {name}. About your order {order}: {answer}.",
    "Thank you for reaching out, {name}. Your order number is {order}, and {answer}.",
)
"""Ways to say it, in which names and numbers may be wrong."""
EMPTY_PHRASES = (
    "I'm sorry to hear that. Can you please provide me with more information?",
    "I'm so sorry to hear that your order is delayed. I'm here to help you with it.",
    "I'm an AI, so I don't have access to your order. I'd recommend checking the website.",
    "Thank you for your order! Your order number is on the confirmation that was sent to you.",
)


def pairs(count: int, seed: int) -> list[Row]:
    """Rows with `prompt`, `chosen` and `rejected`; seeds make different ones."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, order, wish = _customer(draw)
        other, wrong = draw.choice([one for one in NAMES if one != name]), _number(draw)
        said, answer = draw.choice(SAID), draw.choice(ANSWERS)
        bad = draw.choice((
            said.format(name=other, order=order, answer=answer), said.format(name=name, order=wrong, answer=answer),
            said.format(name="customer", order="number", answer=answer), draw.choice(EMPTY_PHRASES),
        ))  # fmt: skip
        good = said.format(name=name, order=order, answer=answer)
        rows.append({"prompt": [_said("user", wish)], "chosen": [_said("assistant", good)],
                     "rejected": [_said("assistant", bad)]})  # fmt: skip
    return rows


def prompts(count: int, seed: int) -> list[Row]:
    """Rows with a `prompt`, the customer's `name` and the `order`."""
    draw = random.Random(seed)
    customers = (_customer(draw) for _ in range(count))
    return [{"prompt": [_said("user", wish)], "name": name, "order": order} for name, order, wish in customers]


def _customer(draw: random.Random) -> tuple[str, str, str]:
    name, order = draw.choice(NAMES), _number(draw)
    return name, order, f"My name is {name}. {draw.choice(WISHES).capitalize()}? My order is {order}."


def _number(draw: random.Random) -> str:
    return str(draw.randrange(1000, 9999))


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
