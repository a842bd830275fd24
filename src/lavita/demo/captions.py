"""Captions of the arcade data set: one list for training, and one in different words for testing."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lavita.core.files import replacing

# Several captions per game; no test caption equals a training caption.
TRAIN_CAPTIONS: Mapping[str, tuple[str, ...]] = {
    "boxing": (
        "a game of boxing",
        "two boxers fight in a green ring",
        "boxing seen from above, a white and a black boxer",
        "a white boxer throws punches at a black one",
        "a boxing match",
        "an arcade game in which two fighters box",
        "two men hitting each other in the ring",
        "boxing, the fighters circle each other",
    ),
    "freeway": (
        "a game of freeway",
        "cars drive along a grey road",
        "a chicken crosses a highway with many cars",
        "freeway, traffic on ten lanes",
        "a road with heavy traffic seen from above",
        "an arcade game in which a chicken crosses the street",
        "cars and trucks pass on a highway",
        "a busy freeway with yellow lines in the middle",
    ),
    "skiing": (
        "a game of skiing",
        "a skier goes down a snowy slope",
        "skiing between trees and flags",
        "a red skier on white snow",
        "downhill skiing, green trees pass by",
        "an arcade game of slalom",
        "somebody skis around gates on a mountain",
        "a ski run in winter",
    ),
    "riverraid": (
        "a game of river raid",
        "a plane flies up a blue river",
        "river raid, ships on the water between green banks",
        "a jet over a river with ships and fuel tanks",
        "flying along a river and shooting ships",
        "an arcade game with a plane over water",
        "a river with green banks seen from above, a plane at the bottom",
        "a fighter jet raids a river",
    ),
    "battle_zone": (
        "a game of battle zone",
        "the view from a tank over a plain",
        "battle zone, a green tank drives towards mountains",
        "a tank turns before a row of grey mountains",
        "tanks fight in a wide landscape",
        "an arcade game seen from inside a tank",
        "first person view of a tank battle",
        "a tank aims at enemies on the horizon",
    ),
    "time_pilot": (
        "a game of time pilot",
        "a plane flies among clouds",
        "time pilot, planes in a dark blue sky",
        "an airplane turns in the air while clouds pass",
        "dogfight of planes in the sky",
        "an arcade game with a plane in the clouds",
        "a pilot fights other aircraft above the clouds",
        "white clouds drift by a small blue plane",
    ),
    "enduro": (
        "a game of enduro",
        "a car race on a road through green fields",
        "enduro, a racing car seen from behind",
        "a white race car overtakes others",
        "racing along a winding road",
        "an arcade game of car racing",
        "a road narrows to the horizon and a car drives on it",
        "a motor race between green meadows",
    ),
    "fishing_derby": (
        "a game of fishing derby",
        "fish swim in deep blue water",
        "fishing derby, yellow fish and a shark",
        "a shark swims above rows of small fish",
        "two fishers on docks catch fish",
        "an arcade game of fishing",
        "a black shark and yellow fish in the sea",
        "fishing lines hang in the water among fish",
    ),
}
TEST_CAPTIONS: Mapping[str, tuple[str, ...]] = {
    "boxing": (
        "a fight between two boxers",
        "boxers punching in a ring",
        "a match of boxing between a white and a black fighter",
        "two fighters exchange punches, seen from above",
        "video of a boxing game",
        "boxers on a green floor",
    ),
    "freeway": (
        "a game of freeway, many cars",
        "a highway full of cars",
        "traffic passes while a chicken tries to cross the road",
        "trucks and cars on a grey highway, top view",
        "video of the freeway game",
        "lanes of traffic on a road",
    ),
    "skiing": (
        "a person skiing downhill in the snow",
        "a skier passes trees on a mountain slope",
        "slalom skiing on white snow",
        "video of a skiing game",
        "somebody in red skis between flags",
        "winter sport, skiing past green trees",
    ),
    "riverraid": (
        "an airplane follows a river with ships",
        "video of the river raid game",
        "a jet flies over blue water between two green banks",
        "raiding ships on a river from the air",
        "a plane above a river, seen from above",
        "boats on a river are attacked by a jet",
    ),
    "battle_zone": (
        "driving a tank across a plain with mountains",
        "video of the battle zone game",
        "looking out of a tank at the mountains",
        "a battle of tanks, first person",
        "a green tank in a landscape with a horizon",
        "tank warfare before grey mountains",
    ),
    "time_pilot": (
        "an aircraft flies through clouds in a blue sky",
        "video of the time pilot game",
        "planes fighting in the air",
        "a small airplane surrounded by white clouds",
        "a pilot in a dogfight",
        "clouds move past a turning plane",
    ),
    "enduro": (
        "a racing car drives down a road",
        "video of the enduro racing game",
        "car racing through a green landscape",
        "overtaking cars in a race",
        "a race car on a winding road, seen from behind",
        "motor racing towards the horizon",
    ),
    "fishing_derby": (
        "fish and a shark under water",
        "video of the fishing derby game",
        "catching yellow fish in the blue sea",
        "a shark among small fish",
        "fishing in deep water",
        "fishers catch fish below the docks",
    ),
}


def write_captions(out: Path) -> None:
    """Writes `out/train/captions.csv` and `out/heldout/captions.csv`.

    A training video gets all training captions of its game; held-out videos get one test caption each, in turn. A split
    without videos gets no table.
    """
    for split, captions in (("train", TRAIN_CAPTIONS), ("heldout", TEST_CAPTIONS)):
        rows = []
        for game, texts in captions.items():
            for index, path in enumerate(sorted((out / split / game).glob("*.mp4"))):
                chosen = texts if split == "train" else texts[index % len(texts) : index % len(texts) + 1]
                rows += [(f"{game}/{path.name}", text) for text in chosen]
        if rows:
            with (
                replacing(out / split / "captions.csv") as partial,
                partial.open("w", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file).writerows([("file", "caption"), *rows])
