"""Data: data sets and their layouts, clips, captions, and the latent cache."""
