"""The objects of arcade games: counted in frames that were drawn for the purpose, and in real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lavita.demo.games import FRAME_SIZE
from lavita.demo.sprites import SPRITES, Sprite, compare_sprites, count_sprites
from lavita.video.writing import write_video

GREEN, WHITE, BLACK, GRAY, RED = (108, 154, 64), (214, 214, 214), (0, 0, 0), (142, 142, 142), (236, 130, 130)


def sprite(game: str, name: str) -> Sprite:
    return next(each for each in SPRITES if (each.game, each.name) == (game, name))


def drawn(
    background: tuple[int, int, int], *boxes: tuple[int, int, int, int, tuple[int, int, int]]
) -> npt.NDArray[np.uint8]:
    """A frame with boxes: rows from and to, columns from and to, color."""
    frame = np.full((FRAME_SIZE, FRAME_SIZE, 3), background, dtype=np.uint8)
    for top, bottom, left, right, color in boxes:
        frame[top:bottom, left:right] = color
    return frame


def test_boxers_are_counted_by_their_colors() -> None:
    both = drawn(GREEN, (10, 20, 10, 16, WHITE), (30, 40, 30, 36, BLACK))
    one = drawn(GREEN, (10, 20, 10, 16, WHITE))
    ghost = drawn(GREEN, (10, 20, 10, 16, (125, 160, 100)))  # nearly the floor's color
    frames = np.stack([both, one, ghost])
    assert count_sprites(sprite("boxing", "white boxer"), frames).tolist() == [1, 1, 0]
    assert count_sprites(sprite("boxing", "black boxer"), frames).tolist() == [1, 0, 0]


def test_areas_that_touch_at_a_corner_are_one_object_and_small_ones_are_none() -> None:
    cars = sprite("freeway", "cars")
    apart = drawn(GRAY, (5, 8, 5, 8, RED), (5, 8, 20, 23, RED), (50, 53, 60, 64, RED))
    corner = drawn(GRAY, (5, 8, 5, 8, RED), (8, 11, 8, 11, RED))
    small = drawn(GRAY, (5, 7, 5, 7, RED))
    snake = drawn(GRAY, (5, 6, 5, 60, RED), (5, 40, 59, 60, RED), (39, 40, 2, 60, RED))
    assert count_sprites(cars, np.stack([apart, corner, small, snake])).tolist() == [3, 1, 0, 1]


def test_only_the_part_of_the_screen_that_an_object_can_be_in_counts() -> None:
    shark = sprite("fishing_derby", "shark")
    blue = (24, 26, 167)
    frames = np.stack([drawn(blue, (9, 13, 20, 34, BLACK)), drawn(blue, (0, 64, 0, 8, BLACK), (40, 44, 20, 34, BLACK))])
    assert count_sprites(shark, frames).tolist() == [1, 0]


def test_folders_are_compared_game_by_game(tmp_path: Path) -> None:
    two = drawn(GRAY, (4, 10, 5, 15, RED), (4, 10, 30, 40, RED))
    one = drawn(GRAY, (4, 10, 5, 15, RED))
    for folder, game, frame in (("real", "freeway", two), ("generated", "freeway", one), ("real", "boxing", two)):
        write_video(tmp_path / folder / game / "0.mp4", np.stack([frame] * 8), 15)
    (row,) = compare_sprites(tmp_path / "real", tmp_path / "generated")
    assert row == {"game": "freeway", "sprite": "cars", "real": 2.0, "generated": 1.0, "ratio": pytest.approx(0.5)}
    assert compare_sprites(tmp_path / "generated", tmp_path / "nothing") == []
