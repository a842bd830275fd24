"""Feature networks, and the features of clips and frames."""
