"""Initialisation from pretrained weights: of DiT, of Latte, or of an earlier run."""
