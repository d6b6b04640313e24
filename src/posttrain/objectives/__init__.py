"""Objectives: pure functions from `(Outputs, Batch)` to summed losses and metrics, one file a method."""
