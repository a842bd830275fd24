"""Networks, and the features of clips and frames that are read from their outputs."""
