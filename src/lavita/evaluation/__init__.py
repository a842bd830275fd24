"""Evaluation: scores of generated videos against real ones."""
