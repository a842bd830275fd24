"""How close training, sampling and everything around them come to the machine's own limits.

Times measured on one machine say little about another, so each figure is a ratio of candidates that took turns in one
run: the time of an implementation over its *floor*, the matrix products of the same pass back to back and nothing else.
"""
