"""The rewards that have names: `reward_funcs="numeric_answer"`, or as it is written in a config file.

Those that need settings (a pattern, a length, a schema of their own) are made in Python; see docs/rewards.md.
"""

from __future__ import annotations

from posttrain.rewards.coding import code_tests
from posttrain.rewards.equivalence import math_answer
from posttrain.rewards.functions import RewardFunction
from posttrain.rewards.matching import exact_match
from posttrain.rewards.numerals import numeric_answer
from posttrain.rewards.patterns import think_answer
from posttrain.rewards.structured import json_schema, json_valid

LIBRARY: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "math_answer": math_answer,
    "think_answer": think_answer,
    "json_valid": json_valid,
    "json_schema": json_schema(),
    "code_tests": code_tests,
}
