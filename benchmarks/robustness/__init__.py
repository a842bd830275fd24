"""Whether interrupted commands end in the same files as uninterrupted ones."""
