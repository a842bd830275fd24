"""Studies of the model: what it costs."""
