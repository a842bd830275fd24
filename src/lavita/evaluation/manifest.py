"""Manifests: the chosen clips as JSON, to be looked at and to be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lavita.core.files import write_json
from lavita.core.text import normal_name
from lavita.data.catalog import Video
from lavita.evaluation.clips import VERSION, Clip, ClipSet, make_clip
from lavita.evaluation.protocol import Protocol
from lavita.evaluation.sources import Source


def write_manifest(file: Path, sets: Mapping[str, ClipSet], protocol: Protocol) -> None:
    """Writes the chosen clips.

    Args:
        file: the JSON file to write.
        sets: by name.
        protocol: what they were chosen by; `read_manifest` insists on the same.
    """
    write_json(
        file,
        {
            "version": VERSION,
            "settings": _settings(protocol),
            "sides": {
                name: {
                    "folder": str(clips.root),
                    "frame_interval": clips.frame_interval,
                    "digest": clips.digest,
                    "clips": [asdict(clip) for clip in clips.clips],
                }
                for name, clips in sets.items()
            },
        },
    )


def read_manifest(file: Path, sources: Mapping[str, Source], protocol: Protocol) -> dict[str, ClipSet]:
    """Reads sets of clips, and checks that their videos are there.

    Args:
        file: written by `write_manifest`.
        sources: the videos of each set to read. They are found by content; names may have changed.
        protocol: as for `write_manifest`.

    Returns:
        The sets by name, without those that the file does not have.

    Raises:
        ValueError: if the file is damaged, was written for other settings, or names a video that is not there.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sets = {
            name: (row["frame_interval"], [Clip(**clip) for clip in row["clips"]])
            for name, row in content["sides"].items()
        }
        written = content["settings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is not a manifest of clips ({type(error).__name__})") from error
    for key, value in _settings(protocol).items():
        if written.get(key) != value:
            raise ValueError(f"{file}: was written with {key}={written.get(key)}, but {value} was asked for")
    result = {}
    for name, source in sources.items():
        if name not in sets:
            continue
        interval, clips = sets[name]
        videos: dict[str, list[Video]] = {}
        for video in source.catalog.videos:
            videos.setdefault(source.folder.sha256(video), []).append(video)
        found = []
        for clip in clips:
            if clip.sha256 not in videos:
                raise ValueError(f"{file}: names {clip.name}, but no video below {source.catalog.root} has its content")
            copies = videos[clip.sha256]
            video = next((copy for copy in copies if normal_name(copy.name) == normal_name(clip.name)), copies[0])
            found.append(make_clip(source, video, clip.start, clip.num_frames))
        result[name] = ClipSet(source.catalog.root, tuple(found), interval)
    return result


def _settings(protocol: Protocol) -> dict[str, Any]:
    fields = ("num_real_clips", "num_generated_clips", "num_frames", "frame_interval", "real_videos")
    return {key: getattr(protocol, key) for key in (*fields, "max_clips_a_video", "seed")}
