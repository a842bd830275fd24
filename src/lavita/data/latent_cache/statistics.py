"""The statistics of the latents in a cache, measured on frames that are spread evenly over it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

from lavita.data.latent_cache.shards import Shard, read_rows
from lavita.models.latent_statistics import LatentMoments, LatentStatistics

MEASURED_FRAMES = 1024


def spread_frames(lengths: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """Frames at equal distances in a row of videos: `count` of them, or all if there are fewer.

    Args:
        lengths: the number of frames of each video.
        count: number of frames.

    Yields:
        The index of a video, and that of a frame in it, both rising.
    """
    ends = list(accumulate(lengths))
    count = min(count, ends[-1])
    for number in range(count):
        position = (2 * number + 1) * ends[-1] // (2 * count)
        video = bisect_right(ends, position)
        yield video, position - (ends[video - 1] if video else 0)


def cache_statistics(rows: Sequence[dict[str, Any]], shards: Mapping[str, Shard]) -> LatentStatistics:
    """Measures the latents of a cache, without the mirrored ones, in the same way whoever asks.

    Args:
        rows: the videos of its manifest.
        shards: the headers of its shards by the names of their files.

    Raises:
        ValueError: if a shard ends too early.
    """
    moments = LatentMoments()
    frames = spread_frames([row["num_frames"] for row in rows], MEASURED_FRAMES)
    for number, group in groupby(frames, key=itemgetter(0)):
        shard = shards[rows[number]["shard"]]
        offsets = shard.offsets[rows[number]["name"]][:2]
        with shard.path.open("rb", buffering=0) as stream:
            for _, frame in group:
                row = range(frame, frame + 1)
                moments.add(*(read_rows(stream.fileno(), offset, shard.frame_shape, row) for offset in offsets))
    return moments.statistics()
