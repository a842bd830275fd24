"""Class accuracy and motion per class."""
