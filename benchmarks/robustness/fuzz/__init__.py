"""The fuzzer: seeded bad inputs to every command, and what must hold for each of them."""
