"""Sampling: the pipeline from noise to videos, its schedulers, and recipes that trade quality for time."""
