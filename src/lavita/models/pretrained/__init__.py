"""Loads the weights of other models: DiT, Latte, and earlier runs."""
