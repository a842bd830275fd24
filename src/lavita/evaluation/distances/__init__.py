"""Formulas: distances between two sets of features, and scores of one set."""
