"""Episodes of the emulator study: videos of play, with the action of each frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lavita.core.files import write_text
from lavita.core.progress import Progress
from lavita.demo.games import FPS, GAMES, Game, episode_seed, play_episode
from lavita.video.writing import write_video

NAMES = tuple(game.name for game in GAMES)
VIEWS: Mapping[str, tuple[int, int, int, int]] = {"freeway": (12, 115, 76, 195)}
"""Parts of the screen that differ from those of the arcade data set, whose freeway shows the player's chicken in 18% of
the frames only: this one has the side where it starts, and shows it in 98%."""


def find_games(names: Sequence[str]) -> list[Game]:
    """The games with these names, as the study shows them.

    Raises:
        ValueError: for a name that is no game, or is there twice.
    """
    for place, name in enumerate(names):
        if name not in NAMES or name in names[:place]:
            raise ValueError(f"games has {name!r}, but must name each once; allowed: {', '.join(NAMES)}")
    return [replace(game, crop=VIEWS.get(game.name, game.crop)) for game in GAMES if game.name in names]


def render(folder: Path, split: str, games: Sequence[Game], num_episodes: int, num_frames: int, suffix: str) -> Path:
    """Renders `folder/<split>/<game>/<number><suffix>`, and a table of the actions for `data.actions`.

    What is there already is kept: an interrupted call can be repeated. An episode depends only on its game, its number,
    the split and the length.

    Args:
        folder: folder to write to.
        split: name of the split; different splits have different play.
        games: the games.
        num_episodes: videos of each game.
        num_frames: frames of each video.
        suffix: `.mp4`, or the lossless `.mkv`.

    Returns:
        The table, `folder/<split>.csv`.
    """
    wanted = [(game, number) for game in games for number in range(num_episodes)]
    progress, rows = Progress(f"{split}: episode", len(wanted)), []
    for done, (game, number) in enumerate(wanted, start=1):
        name = f"{game.name}/{number:03d}"
        video, note = folder / split / f"{name}{suffix}", folder / f"{split}-actions" / f"{name}.txt"
        if not (video.exists() and note.exists()):
            episode = play_episode(game, episode_seed(game, 0, f"emulator {split}", number), num_frames)
            write_video(video, episode.frames, FPS)
            write_text(note, " ".join(episode.actions))
        rows.append((f"{name}{suffix}", note.read_text(encoding="utf-8")))
        progress.update(done)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "actions"), *rows])
    table = folder / f"{split}.csv"
    write_text(table, text.getvalue())
    return table
