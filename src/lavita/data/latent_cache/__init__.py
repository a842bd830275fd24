"""The latent cache: every frame of a data set, encoded once."""
