"""`lavita bench`: how near to the machine's own limits everything runs, measured where the user is.

Times of one machine say little of another, so each figure is a ratio of things that took turns in one run: an
implementation over its *floor*, the matrix products of the same pass back to back and nothing else.
"""
