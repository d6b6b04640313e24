"""How good a model is at a task: answers, scores, and what changed between two models."""
