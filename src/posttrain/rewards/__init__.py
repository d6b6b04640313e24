"""Rewards: what a completion is worth. Functions of the user's, reward models, and a library of verifiable ones.

A reward is a function with TRL's signature: `prompts`, `completions`, `completion_ids` and every further column of the
data by keyword, a list of numbers back, None where it says nothing of a completion. With prompts that are messages a
completion is a list of messages too.
"""
