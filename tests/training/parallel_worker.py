"""Trains the runs of the given configuration files one after the other; `parallel_runs.py` starts it with torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

from lavita.core.config import load_config, read_yaml
from lavita.core.processes import processes
from lavita.training.config import RunConfig
from lavita.training.train import train

if __name__ == "__main__":
    with processes():
        for file in sys.argv[1:]:
            train(load_config(RunConfig, read_yaml(Path(file))))
