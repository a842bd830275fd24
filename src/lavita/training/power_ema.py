"""Post-hoc EMA (Karras et al. 2024, Sec. 3): averages of any length, reconstructed after training.

Two averages with power-function profiles are tracked and stored at intervals. At step t an average of the exponent
gamma weights the weights of time tau in proportion to tau^gamma. The profile of another exponent is approximated by a
combination of the stored profiles, and the same combination of the stored averages is the average of that profile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lavita.core.files import replacing
from lavita.core.processes import Processes, whole
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.pipeline_folder import save_pipeline
from lavita.training.config import LEAST_LENGTH, MOST_LENGTH
from lavita.training.ema import EMA

FOLDER = "averages"
"""Folder of the snapshots in that of a run."""
_NAME = re.compile(r"step-(\d+)\.safetensors")


def exponent(sigma_rel: float) -> float:
    """The exponent gamma of the profile whose standard deviation is `sigma_rel` of the time so far (Eq. 126).

    Raises:
        ValueError: for a length outside of `LEAST_LENGTH` to `MOST_LENGTH`.
    """
    if not LEAST_LENGTH <= sigma_rel <= MOST_LENGTH:
        raise ValueError(f"sigma_rel is {sigma_rel:g}, but must be in {LEAST_LENGTH:g} to {MOST_LENGTH:g}")
    precision = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision])
    return float(roots.real.max())


class PowerEMA(EMA):
    """An average whose memory grows with the run: its profile at step t is a power of the time up to t."""

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        """Prepares an average of the relative length `sigma_rel`; the first update sets it to the weights."""
        super().__init__(model, 0.0)
        self.sigma_rel, self._exponent = sigma_rel, exponent(sigma_rel)

    def decay_of(self, step: int) -> float:
        """The decay at a step (from 1), for which the profile keeps its form (Eq. 127)."""
        return float((1 - 1 / step) ** (self._exponent + 1))


@dataclass(frozen=True)
class Profile:
    """The density of the weights in an average: (gamma + 1) tau^gamma / t^(gamma + 1) for tau in 0..t."""

    step: int
    """t, the step of the average."""
    sigma_rel: float

    def overlap(self, other: Profile) -> float:
        """The integral of the product of two densities over time."""
        first, second = exponent(self.sigma_rel), exponent(other.sigma_rel)
        begin, end = sorted((self.step, other.step))
        later = first if self.step == end else second
        return (first + 1) * (second + 1) / (first + second + 1) * (begin / end) ** later / end


def solve(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The combination of profiles that is nearest to another one (Karras et al. 2024, Algorithm 3).

    Returns:
        One coefficient per profile, float64, with the sum 1, and the distance that is left, relative to the norm of the
        wanted profile.
    """
    scales = np.sqrt([profile.overlap(profile) for profile in stored])
    gram = np.array([[one.overlap(other) for other in stored] for one in stored]) / np.outer(scales, scales)
    target = np.array([profile.overlap(wanted) for profile in stored]) / scales
    norm = wanted.overlap(wanted)
    solution = np.linalg.lstsq(gram, target, rcond=1e-12)[0]
    left = norm - 2 * solution @ target + solution @ gram @ solution
    coefficients = solution / scales
    return coefficients / coefficients.sum(), float(np.sqrt(max(left, 0.0) / norm))


def save_snapshot(run_dir: Path, step: int, averages: Sequence[PowerEMA], team: Processes | None = None) -> None:
    """Stores all averages of a step in float16, in `averages/step-<step>.safetensors`.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        averages: plain or sharded; all processes call this together.
        team: the processes; the first one writes.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    tensors = {
        _key(average.sigma_rel, name): whole(tensor).half().cpu().contiguous()
        for average in averages
        for name, tensor in average.weights.items()
    }
    if not (team or Processes()).is_first:
        return
    with replacing(run_dir / FOLDER / f"step-{step:08d}.safetensors", durable=True) as partial:
        try:
            save_file(tensors, partial)
        except SafetensorError as error:  # its writer's error for a full disk
            raise OSError(f"{partial}: {error}") from error


@dataclass(frozen=True)
class Reconstruction:
    """An average that was reconstructed from snapshots."""

    weights: Mapping[str, torch.Tensor]
    """The averaged weights by name, float32; without those that were not trained."""
    step: int
    """The step at which the average ends."""
    error: float
    """Distance of the combined profile from the wanted one, relative to the norm of the latter."""
    num_snapshots: int


def reconstruct(run_dir: Path, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """Reconstructs the average of a relative length from the snapshots of a run.

    Args:
        run_dir: the run's folder.
        sigma_rel: standard deviation of the average's profile, as a share of the steps before it.
        step: the step at which the average ends; by default that of the last snapshot.

    Raises:
        ValueError: for a length out of range, or if there are no snapshots up to the step.
    """
    exponent(sigma_rel)
    files = {
        int(found.group(1)): path
        for path in sorted((run_dir / FOLDER).glob("step-*.safetensors"))
        if (found := _NAME.fullmatch(path.name))
    }
    if not files:
        raise ValueError(f"{run_dir}: has no snapshots of averages; train with train.power_ema=[0.05,0.1]")
    end = max(files) if step is None else step
    if end not in files:
        near = ", ".join(f"{number:,}" for number in sorted(files, key=lambda number: abs(number - end))[:3])
        raise ValueError(f"step is {end:,}, but {run_dir} has no snapshot of it; the nearest are of {near}")
    used = {number: path for number, path in files.items() if number <= end}
    stored = [Profile(number, length) for number, path in used.items() for length in _lengths(path)]
    coefficients, error = solve(stored, Profile(end, sigma_rel))
    weights: dict[str, torch.Tensor] = {}
    for profile, coefficient in zip(stored, coefficients, strict=True):
        with safe_open(used[profile.step], framework="pt") as file:
            prefix = _key(profile.sigma_rel, "")
            for key in file.keys():  # noqa: SIM118  not a mapping
                if key.startswith(prefix):
                    name = key.removeprefix(prefix)
                    part = coefficient * file.get_tensor(key).double()
                    weights[name] = weights[name] + part if name in weights else part
    return Reconstruction({name: total.float() for name, total in weights.items()}, end, error, len(used))


def write_reconstruction(run_dir: Path, sigma_rel: float, out: Path, step: int | None = None) -> Reconstruction:
    """Writes the run's pipeline with reconstructed averages in place of its own; see `reconstruct`.

    Args:
        run_dir: the run's folder.
        sigma_rel: as in `reconstruct`.
        out: folder to write; empty or missing.
        step: as in `reconstruct`.

    Raises:
        ValueError: as in `reconstruct`, or if the run has no pipeline or `out` is in use.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; give another")
    found = reconstruct(run_dir, sigma_rel, step)
    pipeline = load_pipeline(run_dir / "pipeline")
    parameters = dict(pipeline.transformer.named_parameters())
    with torch.no_grad():
        for name, tensor in found.weights.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(f"{run_dir}: its snapshots do not belong to its pipeline, which has no such {name}")
            parameters[name].copy_(tensor)
    save_pipeline(pipeline, out)
    return found


def _key(sigma_rel: float, name: str) -> str:
    return f"{sigma_rel:g}/{name}"


def _lengths(path: Path) -> list[float]:
    """The relative lengths of the averages in a snapshot."""
    with safe_open(path, framework="pt") as file:
        return sorted({float(key.partition("/")[0]) for key in file.keys()})  # noqa: SIM118  not a mapping
