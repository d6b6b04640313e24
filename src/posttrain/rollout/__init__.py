"""Prompts in, completions with their rewards and advantages out: what online reinforcement learning trains on."""
