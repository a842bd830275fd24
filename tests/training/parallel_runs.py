"""Training runs on several processes, and how they are compared with those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from run_folders import last_checkpoint, lines_of

from lavita.core.config import save_config
from lavita.training.config import RunConfig

WORKER = Path(__file__).with_name("parallel_worker.py")


def torchrun(count: int, *configs: RunConfig) -> None:
    """Trains runs one after the other on several processes."""
    files: list[Path] = []
    for config in configs:
        files.append(config.run_dir.with_suffix(f".{len(files)}.yaml"))
        save_config(config, files[-1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    result = subprocess.run(
        [*launch, str(WORKER), *map(str, files)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def tensors_of(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = last_checkpoint(config)
    assert checkpoint.step == config.train.steps
    return checkpoint.read_all()


def assert_alike(run: RunConfig, expected: RunConfig) -> None:
    """Two runs differ only by the rounding of sums in another order (float32)."""
    lines, expected_lines = lines_of(run), lines_of(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([line[key] for line in lines], [line[key] for line in expected_lines], rtol=2e-5)
    tensors, others = tensors_of(run), tensors_of(expected)
    assert tensors.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
