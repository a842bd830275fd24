"""Training of autoencoders: `lavita autoencoder train`."""
