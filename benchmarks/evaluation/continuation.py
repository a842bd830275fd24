"""Do videos go on as the real ones did? Continuations of held-out clips, frame by frame, against the true frames.

`lavita sample --video FOLDER --keep-frames K` goes on with each video of a folder; here its videos are compared with
what came next. Two simple predictions stand beside them: the last given frame, repeated, and a linear extrapolation
from the last two. A model that draws one of many possible futures need not come closer than these on average, but its
best of several seeds should.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from lavita.core.files import write_json
from lavita.data.catalog import read_generation, scan
from lavita.sampling.names import table_prefixes
from lavita.video.formats import Frames
from lavita.video.reading import iter_frames, read_clip

BOOTSTRAPS = 1000


def study_continuation(real: Path, generated: Path, keep_frames: int, out: Path | None) -> None:
    """Prints the PSNR of continuations and of simple predictions, with 95% intervals over the videos.

    Args:
        real: folder of videos whose first frames were given.
        generated: folder that `lavita sample --video REAL` has written.
        keep_frames: number of given frames.
        out: JSON file, or None.

    Raises:
        ValueError: if `generated` holds no continuation of a video in `real`.
    """
    settings = read_generation(generated) or {}
    interval = settings.get("frame_interval", 1)
    clips = find_clips(real, generated, interval)
    if not clips:
        raise ValueError(f"{generated}: holds no continuation of a video in {real}")
    rows = compare(clips, keep_frames)
    first, last = keep_frames, next(iter(clips.values()))[0].shape[0] - 1
    table = Table("prediction", f"frames {first} to {last}", *(f"frame {place}" for place in horizons(first, last)))
    for name, values in rows.items():
        table.add_row(name, "{:.2f} ({:.2f} to {:.2f})".format(*values["all"]), *(f"{v:.2f}" for v in values["at"]))
    Console().print(table)
    print(f"PSNR in dB of {len(clips)} videos; frames are counted from 0")
    if out is not None:
        write_json(out, rows)


def find_clips(real: Path, generated: Path, frame_interval: int) -> dict[str, tuple[Frames, list[Frames]]]:
    """The true frames and the continuations, one per seed, of each video that was gone on with."""
    found = {}
    videos = {video.name: video for video in scan(real).videos}
    for prefix, name in table_prefixes({name: [name] for name in videos}):
        files = sorted((generated / prefix).parent.glob(f"{Path(prefix).name}*.m*"))
        if files:
            made = [np.stack(list(iter_frames(file))) for file in files]
            true = read_clip(videos[name].info.path, 0, len(made[0]), frame_interval)
            if true.shape != made[0].shape:
                raise ValueError(f"{files[0]}: has another size than {videos[name].info.path}")
            found[name] = true, made
    return found


def horizons(first: int, last: int) -> list[int]:
    """A few frames, closer to each other at first."""
    return sorted({min(first + step, last) for step in (0, 1, 3, 7, last)})


def compare(clips: dict[str, tuple[Frames, list[Frames]]], keep_frames: int) -> dict[str, dict[str, Any]]:
    """For each prediction `all`, mean PSNR of the frames that were not given with its interval, and `at` horizons."""
    errors: dict[str, list[npt.NDArray[np.float64]]] = defaultdict(list)
    for true, made in clips.values():
        wanted = true[keep_frames:].astype(np.float64)
        steps = np.arange(1, len(wanted) + 1)[:, None, None, None]
        before = true[keep_frames - 1].astype(np.float64)
        seeds = np.stack([_errors(clip[keep_frames:], wanted) for clip in made])
        errors["model, mean over the seeds"].append(seeds.mean(axis=0))
        errors["model, best seed"].append(seeds[seeds.mean(axis=1).argmin()])
        errors["last given frame, repeated"].append(_errors(np.broadcast_to(before, wanted.shape), wanted))
        if keep_frames > 1:
            slope = before - true[keep_frames - 2]
            errors["linear extrapolation"].append(_errors((before + steps * slope).clip(0, 255), wanted))
    random = np.random.default_rng(0)
    count, length = len(clips), len(wanted)
    picks = random.integers(0, count, (BOOTSTRAPS, count))
    places = [place - keep_frames for place in horizons(keep_frames, keep_frames + length - 1)]
    rows = {}
    for name, values in errors.items():
        each = np.stack(values)  # (videos, frames)
        resampled = _psnr(each.mean(axis=1)[picks].mean(axis=1))
        bounds = np.quantile(resampled, [0.025, 0.975])
        rows[name] = {
            "all": [float(_psnr(each.mean())), *map(float, bounds)],
            "at": [float(_psnr(each[:, place].mean())) for place in places],
        }
    return rows


def _errors(made: npt.NDArray[Any], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(((made - wanted) ** 2).mean(axis=(1, 2, 3)), dtype=np.float64)


def _psnr(error: Any) -> Any:
    with np.errstate(divide="ignore"):  # no error has an infinite PSNR
        return 10 * np.log10(255**2 / error)
