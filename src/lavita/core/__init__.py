"""What every other room stands on: strict configuration, devices and precision, seeds, files, processes, progress."""
