"""From noise to videos: the pipeline, its schedulers, and recipes that trade time for quality."""
