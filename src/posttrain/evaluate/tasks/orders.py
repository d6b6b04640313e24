"""The demo's task: a customer's message becomes one JSON order, and a program can tell whether it is right.

    "hi, could you get a dozen oak shelves over to Porto by Fri? thanks"
    -> {"item": "oak shelf", "quantity": 12, "city": "Porto", "day": "friday"}

The instruction says all of it, and a small instruct model still gets almost none right: it mixes up the fields, writes
numbers as strings, leaves plurals and capitals. All of that is quickly learnt. Held-out rows name items (a material
with a product) that no training row names, so copying an answer from memory does not help.

Everything is made from the tables below by a seeded generator. Left out: several items in one order, and typing errors.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

INSTRUCTION = (
    "Read the customer's message and answer with the order as one line of JSON: "
    '{"item": singular, "quantity": number, "city": name, "day": weekday in lower case}.'
)
FIELDS = ("item", "quantity", "city", "day")

MATERIALS = (
    "oak", "pine", "steel", "brass", "copper", "glass", "wool", "linen", "cotton", "leather", "bamboo", "marble",
    "ceramic", "red", "blue", "green", "black", "white", "grey", "folding", "outdoor", "vintage", "small", "large",
)  # fmt: skip
PRODUCTS = {
    "shelf": "shelves", "knife": "knives", "box": "boxes", "brush": "brushes", "bench": "benches", "dish": "dishes",
    "battery": "batteries", "tray": "trays", "chair": "chairs", "table": "tables", "lamp": "lamps", "mirror": "mirrors",
    "blanket": "blankets", "basket": "baskets", "candle": "candles", "cushion": "cushions", "vase": "vases",
    "bottle": "bottles", "kettle": "kettles", "clock": "clocks", "frame": "frames", "ladder": "ladders",
    "planter": "planters", "stool": "stools", "tile": "tiles", "hook": "hooks", "mug": "mugs", "rug": "rugs",
}  # fmt: skip
CITIES = (
    "Porto", "Lisbon", "Madrid", "Seville", "Lyon", "Paris", "Turin", "Milan", "Rome", "Vienna", "Graz", "Prague",
    "Brno", "Warsaw", "Berlin", "Hamburg", "Munich", "Leipzig", "Oslo", "Bergen", "Malmo", "Dublin", "Cork", "Leeds",
    "Glasgow", "Ghent", "Antwerp", "Utrecht", "Athens", "Sofia", "Riga", "Tallinn",
)  # fmt: skip
DAYS = {
    "monday": ("Monday", "Mon", "monday"),
    "tuesday": ("Tuesday", "Tue", "tuesday"),
    "wednesday": ("Wednesday", "Wed", "wednesday"),
    "thursday": ("Thursday", "Thu", "thursday"),
    "friday": ("Friday", "Fri", "friday"),
    "saturday": ("Saturday", "Sat", "saturday"),
    "sunday": ("Sunday", "Sun", "sunday"),
}
NUMBER_WORDS = {
    "a couple of": 2, "a pair of": 2, "half a dozen": 6, "a dozen": 12, "two dozen": 24, "three dozen": 36,
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
}  # fmt: skip

OPENERS = ("", "", "hi, ", "hello! ", "hey, ", "Good morning. ", "Dear team, ", "Hi there, ", "quick one: ")
CLOSERS = ("", "", " Thanks!", " thanks a lot", " Cheers.", " Please confirm.", " That is all.", " Many thanks, Ana")
ASIDES = (
    " Last time it was {number}, to {city}.",
    " ({city} still has {number}.)",
    " The {number} for {city} came late.",
    " Not {city} again, please.",
    " ({city} is closed on {day}.)",
)
CHANGES = {
    " Sorry, make that {number}.": "quantity",
    " No, wait: {number} of them.": "quantity",
    " Or rather {city}, not {old_city}.": "city",
    " Actually, send them to {city}.": "city",
    " Hmm, {day} would be better.": "day",
    " Sorry, I meant {day}.": "day",
}
REQUESTS = (
    "could you get {goods} over to {city} by {day}?",
    "please send {goods} to {city}, they have to be there on {day}.",
    "we need {goods} in {city} by {day}.",
    "I'd like to order {goods} for our {city} shop, delivery {day}.",
    "can {goods} reach {city} before {day}?",
    "our office in {city} is short of {goods}; {day} would be fine.",
    "for {city}: {goods}, {day}.",
    "on {day} our {city} branch opens, and it wants {goods}.",
    "by {day}, {goods} for {city}.",
    "put me down for {goods}. Ship to {city}, arriving {day}.",
    "it's about {city} again. They ran out and want {goods} on {day}.",
    "{goods} please, to {city}, {day} at the latest.",
    "the customer in {city} asked for {goods} and will be home on {day}.",
    "is {day} possible for {goods}? The address is in {city}.",
    "{city} called: {goods}, and not later than {day}.",
    "next {day} we expect {goods} at the {city} warehouse.",
)


def generate(n: int, seed: int) -> list[Row]:
    """`n` rows with different messages, the same for the same seed."""
    return _draw(n, random.Random(f"orders {seed}"), _items())


def split(n_train: int, n_test: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows: no message and no item stands in both."""
    rng = random.Random(f"orders split {seed}")
    items = _items()
    rng.shuffle(items)
    held_out = len(items) // 5
    return _draw(n_train, rng, items[held_out:]), _draw(n_test, rng, items[:held_out])


def score(completion: str, row: Row) -> float:
    """1.0 where the text is JSON and says exactly the answer, else 0.0; order of keys and blanks do not matter."""
    return float(_canonical(_parse(completion)) == _canonical(row["answer"]))


def field_accuracy(completion: str, row: Row) -> float:
    """The share of the four fields that are right; 0.0 where the text is not a JSON object."""
    order, answer = _parse(completion), row["answer"]
    if not isinstance(order, dict):
        return 0.0
    return sum(_canonical(order.get(key)) == _canonical(answer[key]) for key in FIELDS) / len(FIELDS)


def _items() -> list[tuple[str, str]]:
    """Every item in the singular and the plural."""
    return [(f"{m} {one}", f"{m} {many}") for m in MATERIALS for one, many in PRODUCTS.items()]


def _draw(n: int, rng: random.Random, items: Sequence[tuple[str, str]]) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < n:
        message, answer = _order(rng, items)
        rows.setdefault(message, _row(message, answer))
    return list(rows.values())


def _order(rng: random.Random, items: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    """A message and its answer: a request, often with an aside to be ignored or a change of mind to be followed."""
    item, plural = rng.choice(items)
    written, order = _details(rng)
    message = rng.choice(REQUESTS).format(goods=f"{written['number']} {plural}", **written)
    other_written, other = _other_details(rng, order)
    kind = rng.random()
    if kind < 0.3:
        message += rng.choice(ASIDES).format(**other_written)
    elif kind < 0.6:
        change, key = rng.choice(list(CHANGES.items()))
        message += change.format(old_city=order["city"], **other_written)
        order[key] = other[key]
    return rng.choice(OPENERS) + message + rng.choice(CLOSERS), {"item": item, **order}


def _details(rng: random.Random) -> tuple[dict[str, str], dict[str, Any]]:
    """How many, where to and when: as a customer writes them, and as the order says them."""
    quantity, number = _quantity(rng)
    city, day = rng.choice(CITIES), rng.choice(list(DAYS))
    written = {"number": number, "city": city, "day": rng.choice(DAYS[day])}
    return written, {"quantity": quantity, "city": city, "day": day}


def _other_details(rng: random.Random, order: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Details of which none is the order's, with a number that can stand alone ("a couple", not "a couple of")."""
    while True:
        written, other = _details(rng)
        if all(other[key] != order[key] for key in other):
            return {**written, "number": written["number"].removesuffix(" of")}, other


def _quantity(rng: random.Random) -> tuple[int, str]:
    """A number and how it is written: half the time in digits, half in words."""
    if rng.random() < 0.5:
        number = rng.randint(2, 99)
        return number, str(number)
    words = rng.choice(list(NUMBER_WORDS))
    return NUMBER_WORDS[words], words


def _row(message: str, answer: dict[str, Any]) -> Row:
    prompt = [{"role": "user", "content": f"{INSTRUCTION}\n\nMessage: {message}"}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": json.dumps(answer)}], "answer": answer}


def _parse(text: str) -> Any:
    """The value that the text is in JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _canonical(value: Any) -> str:
    """One spelling per JSON value, in which 12, 12.0 and "12" differ, and so do 1 and true."""
    return json.dumps(value, sort_keys=True)
