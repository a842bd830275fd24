"""The study of words: does a model put together what a caption names, in combinations that it has not seen?"""
