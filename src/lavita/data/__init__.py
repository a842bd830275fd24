"""Data: the layouts of data sets, their clips, the latent cache and the demo data set."""
