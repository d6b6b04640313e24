"""Rewards: what a completion is worth. Functions of the user's, reward models, and a library of verifiable ones.

A reward is a function with TRL's signature: `prompts`, `completions`, `completion_ids` and every further column of the
data by keyword, a list of numbers back, None where it says nothing of a completion. With prompts that are messages a
completion is a list of messages too.
"""

from posttrain.rewards.coding import code, code_tests
from posttrain.rewards.equivalence import math_answer, maths
from posttrain.rewards.lengths import length_penalty, soft_overlong
from posttrain.rewards.library import LIBRARY
from posttrain.rewards.matching import exact, exact_match
from posttrain.rewards.numerals import numeric, numeric_answer
from posttrain.rewards.patterns import matches, tagged, think_answer
from posttrain.rewards.structured import json_schema, json_valid

__all__ = [
    "LIBRARY",
    "code",
    "code_tests",
    "exact",
    "exact_match",
    "json_schema",
    "json_valid",
    "length_penalty",
    "matches",
    "math_answer",
    "maths",
    "numeric",
    "numeric_answer",
    "soft_overlong",
    "tagged",
    "think_answer",
]
