"""Metrics of class folders: accuracy and motion."""
