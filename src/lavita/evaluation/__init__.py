"""Evaluation: whether generated videos show what was asked for, and move as real ones do."""
