"""UCF101: its class names, and the lists of its three splits (Soomro et al. 2012)."""

from __future__ import annotations

import re
from pathlib import Path

from lavita.core.text import normal_name, read_text

# Sorted as Python sorts, not as in classInd.txt, which ignores case: the labels then do not depend on that file, and
# equal those of the public code, which sorts the folders.
_NAMES = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk
BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag
BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming
Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut HammerThrow Hammering
HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow
JugglingBalls JumpRope JumpingJack Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar
PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing
Rowing SalsaSpin ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty
StillRings SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing
UnevenBars VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo
"""
CLASSES = tuple(_NAMES.split())
_SPELLING = {name.lower(): name for name in CLASSES}
_VIDEO = re.compile(r"v_([A-Za-z]+)_g\d+_c\d+(\.\w+)?")
_LIST = re.compile(r"(train|test)list(0[123])\.txt")


def class_of(path: Path) -> str | None:
    """The class of a video by its name, `v_<Class>_g01_c01`, else by its folder; None if neither is that of a class.

    The spelling of a class is that of its folder: the videos of HandstandPushups are called v_HandStandPushups.
    """
    match = _VIDEO.fullmatch(path.name)
    name = match[1] if match else path.parent.name
    return _SPELLING.get(name.lower(), name if match else None)


def read_split_lists(root: Path) -> dict[str, list[str]]:
    """Reads the lists of the three splits in the folder, or in `ucfTrainTestlist` in it or next to it.

    Returns:
        The names of the videos in train01, test01, ..., without folder and suffix, in normal form and lower case;
        `train` and `test` are those of the first split. Empty if there are no lists.

    Raises:
        ValueError: if a list cannot be read.
    """
    lists: dict[str, list[str]] = {}
    for folder in (root, root / "ucfTrainTestlist", root.resolve().parent / "ucfTrainTestlist"):
        for file in sorted(folder.glob("*list0[123].txt")):
            if not (match := _LIST.fullmatch(file.name)):
                continue
            try:
                lines = read_text(file).split("\n")
            except OSError as error:
                raise ValueError(f"{file}: cannot be read ({error})") from error
            # ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1: only training lists have labels.
            entries = [line.split()[0] for line in lines if line.strip()]
            lists[match[1] + match[2]] = [normal_name(Path(entry).stem).lower() for entry in entries]
        if lists:
            break
    first = {part: lists[f"{part}01"] for part in ("train", "test") if f"{part}01" in lists}
    return {**first, **lists}
