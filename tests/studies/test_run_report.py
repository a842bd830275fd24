"""The page of training runs: what it says and shows, of runs at every stage, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import Run as RunCommand
from PIL import Image
from safetensors.torch import save_file
from tiny_data import paint

from lavita.core.config import ConfigError, load_config, save_config
from lavita.studies.run_report.curves import Curve, draw_panel, smooth, thin
from lavita.studies.run_report.page import MAX_CONTACT_SHEETS, MAX_EVENTS, write_report
from lavita.studies.run_report.reading import clock, read_runs
from lavita.training.config import RunConfig
from lavita.video.writing import write_video

SCORE = "kernel-video[efficientnet_lite0_video]"


class Page(HTMLParser):
    """The text of a page, the rows of its tables, and what it refers to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.svg: list[str] = []
        self._open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag in ("img", "video", "script", "link", "iframe"):
            self.sources.append(values.get("src") or values.get("href") or "")
        if tag == "svg":
            self.svg.append(str(values["aria-label"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "br":
            self.handle_data("; ")
        if tag not in ("img", "meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, *overrides: str, steps: int = 40, samples: tuple[int, ...] = (20, 40)) -> Path:
    """A run's folder as training leaves it: a line each step, two measurements, an event or two."""
    values = {"run_dir": str(folder), "train": {"steps": 80, "batch_size": 4, "log_every": 1}}
    save_config(load_config(RunConfig, values, overrides), folder / "config.yaml")
    write_lines(
        folder / "metrics.jsonl",
        [
            {"step": step, "loss": 2 / step, "lr": 1e-4, "grad_norm": 1 + step % 3, "clips_per_second": 8.0}
            for step in range(1, steps + 1)
        ],
    )
    levels = [[level * scale for level in range(10, 0, -1)] for scale in (0.1, 0.05, 0.06)]
    write_lines(
        folder / "validation.jsonl",
        [
            {"step": step, "loss": sum(row) / 10, "by_noise": row, "simple": 0.2, "simple_by_noise": row}
            for step, row in zip((10, 20, 40), levels, strict=True)
        ],
    )
    write_lines(folder / "scores.jsonl", [{"step": 40, SCORE: 0.1234, f"{SCORE}_standard_error": 0.0056}])
    clip = {"video": "a/<b>.mp4", "start": 17, "flip": True, "loss": 7.5}
    write_lines(
        folder / "events.jsonl",
        [
            {"step": 0, "event": "start", "processes": 2, "parallel": "ddp"},
            {"step": 21, "event": "spike", "loss": 6.25, "grad_norm": 99.5, "skipped": True, "clips": [clip]},
        ],
    )
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000020").mkdir()
    (folder / "checkpoints" / "step-00000040.partial").touch()
    (folder / "pipeline" / "transformer").mkdir(parents=True)
    weights = {"a": torch.zeros(1000, 1200), "b": torch.zeros(34)}
    save_file(weights, folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    for step in samples:
        for index in range(2):
            write_video(folder / "samples" / f"step-{step:08d}" / f"{index}.mp4", paint(3, index), 4)
        Image.fromarray(paint(1, step)[0]).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


def test_names_of_a_run_are_text_on_its_page(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a $^$ b"]
    page = Page(write_report([make_run(tmp_path / name.replace("/", "")) for name in names], tmp_path / "page"))
    assert "<script" not in page.source and "<script>alert(1)<script>" in page.text and "a $^$ b" in page.text
    assert ElementTree.fromstring(draw_panel("$^$ <b>", [Curve("a", "#2a6fdb", [0, 1], [1.0, 2.0])])) is not None


@pytest.mark.parametrize("name", ["step-00000040.png", "step-00000040/1.mp4"])
def test_links_out_of_a_run_are_not_published(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "samples" / name
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(ValueError, match=r"leads out of the folder, through a link"):
        write_report([run], tmp_path / "page")
    assert not (tmp_path / "page" / "index.html").exists()


def test_the_page_of_one_run_says_what_its_lines_say(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = write_report([run], tmp_path / "page")
    page = Page(file)
    facts = dict(row for row in page.rows if len(row) == 2)
    assert facts["steps"] == "40 of 80"
    assert facts["validation loss"] == f"{0.06 * 5.5:.4g}; lowest {0.05 * 5.5:.4g} at step 20"
    assert facts[SCORE] == "0.1234 ± 0.0056"
    assert facts["speed"] == "8 clips/s"
    assert facts["time taken"] == "20 s", "40 steps of 4 clips at 8 a second"
    assert facts["time left at this speed"] == "20 s"
    assert facts["last checkpoint"] == "step 20"
    assert facts["parameters"] == "1.2 M"
    assert facts["train.batch_size"] == "4" and facts["data.horizontal_flip"] == "true" and facts["data.path"] == ""
    assert set(load_config(RunConfig, {}).train.model_dump()) <= {key.removeprefix("train.") for key in facts}
    assert "running" in page.text and "What differs" not in page.text
    spike, start = (row for row in page.rows if "spike" in row or "start" in row)
    assert spike == [
        "21",
        "spike",
        "6.25",
        "99.5",
        "this step was skipped; a/<b>.mp4 from frame 17, mirrored: loss 7.5",
    ]
    assert start == ["0", "start", "", "", "2 processes, parallel=ddp"]
    assert [label for label in page.svg if "noise" not in label] == [
        *("loss", "validation loss", "validation: L_simple", SCORE),
        *("gradient norm", "learning rate", "clips/s", "validation loss over time"),
    ]
    assert len(page.sources) == 2 + 2, "two videos of the newest step, two contact sheets"
    assert page.sources[-2:] == ["files/run-0/step-00000040.png", "files/run-0/step-00000020.png"]
    for source in page.sources:
        assert (file.parent / source).stat().st_size
    assert np.array_equal(np.asarray(Image.open(file.parent / page.sources[-1])), paint(1, 20)[0])


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")], tmp_path / "page"))
    addresses = set(re.findall(r"https?://[^\"'\s<>]+", page.source))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, "names, not addresses"
    assert not re.search(r"<script|<link|@import|url\((?!#)", page.source)
    assert not [name for name in page.ids if name in ("figure_1", "axes_1")]


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a" / "run", "train.learning_rate=1e-3", samples=(20, 40)),
        make_run(tmp_path / "b" / "run", "model.preset=tiny/4", steps=30, samples=(20,)),
    ]
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text() + "new_key: 5\n")
    file = write_report(runs, tmp_path / "page")
    page = Page(file)
    assert "a/run" in page.text and "b/run" in page.text
    start = page.rows.index(["field", "a/run", "b/run"])
    assert page.rows[start + 1 : start + 4] == [
        ["model.preset", "S/2", "tiny/4"],
        ["train.learning_rate", "0.001", "0.0001"],
        ["new_key", "(no such field)", "5"],
    ]
    assert page.rows[start + 4] != ["run_dir", str(runs[0]), str(runs[1])]
    assert [row[0] for row in page.rows if row[1:] == ["", ""]][-2:] == ["40", "20"]
    assert page.sources[-3:] == [
        f"files/{name}.png" for name in ("run-0/step-00000040", "run-0/step-00000020", "run-1/step-00000020")
    ]
    assert all((file.parent / source).exists() for source in page.sources)
    assert {"validation loss by noise level", "validation loss over time: b/run"} <= set(page.svg)
    assert ["b/run", "21", "spike"] in [row[:3] for row in page.rows]


def test_the_curves_are_the_numbers(tmp_path: Path) -> None:
    """The drawn path of a linear curve passes through its points: affine in both axes."""
    svg = ElementTree.fromstring(draw_panel("x", [Curve("a", "#2a6fdb", [0, 10, 30], [5.0, 9.0, 6.0])]))
    (path,) = [
        p
        for p in svg.iter("{http://www.w3.org/2000/svg}path")
        if "stroke: #2a6fdb; stroke-width: 1.5" in p.get("style", "")
    ]
    numbers = np.array(re.findall(r"-?[\d.]+", path.get("d", "")), float).reshape(3, 2)
    for place, values in ((0, [0, 10, 30]), (1, [5.0, 9.0, 6.0])):
        first, middle, last = numbers[:, place]
        assert (middle - first) / (last - first) == pytest.approx(
            (values[1] - values[0]) / (values[2] - values[0]), rel=1e-4
        )


@pytest.mark.parametrize("values", [[3.0] * 400, [1.0, 5.0]])
def test_smoothing_keeps_what_is_constant_and_its_first_value(values: list[float]) -> None:
    result = smooth(values)
    assert len(result) == len(values) and result[0] == pytest.approx(values[0])
    assert result[-1] == pytest.approx(3.0 if len(values) > 2 else 5.0)


def test_smoothing_is_the_weighted_mean_of_what_came_before() -> None:
    values = np.random.default_rng(0).normal(size=100)
    weights = (1 - 25 / 100) ** np.arange(99, -1, -1)
    assert smooth(values.tolist())[-1] == pytest.approx(np.average(values, weights=weights))


def test_a_long_curve_keeps_its_spikes() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[44_444] = 90, -90
    steps, kept = thin(range(50_000), values.tolist())
    assert len(steps) == len(kept) <= 1200
    assert (12_345, 90) in zip(steps, kept, strict=True) and (44_444, -90) in zip(steps, kept, strict=True)
    assert steps == sorted(steps) and [values[int(step)] for step in steps] == kept


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    save_config(load_config(RunConfig, {}, []), tmp_path / "run" / "config.yaml")
    page = Page(write_report([tmp_path / "run"], tmp_path / "page"))
    facts = dict(row for row in page.rows if len(row) == 2)
    assert facts["steps"] == "0 of 100,000" and facts["loss"] == "nothing logged yet"
    assert facts["last checkpoint"] == "none yet"
    assert "just started" in page.text and "Nothing has been logged yet" in page.text and not page.svg


def test_damaged_and_repeated_lines(tmp_path: Path) -> None:
    """A line that is being written is nobody's fault; others are counted, and of a step done twice the later counts."""
    run = make_run(tmp_path / "run", samples=())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4:5] = ["\0\0garbage", '"no object"']
    lines += ['{"step": 40, "loss": NaN}', '{"step": 41, "loss": 0.0125, "clips_per_second": 8.0}', '{"step": 42, "lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "validation.jsonl").write_text('{"step": 10, "lo')
    (run / "samples").mkdir()
    (run / "samples" / "step-00000040.png").write_bytes(b"\x89PNG half")
    (run / "pipeline" / "transformer").mkdir(parents=True, exist_ok=True)
    (run / "pipeline" / "transformer" / "a.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")  # claims 2^63 bytes
    (parsed,) = read_runs([run])
    assert parsed.parameters is None
    assert [row["step"] for row in parsed.metrics] == [1, 2, 3, 4, *range(6, 42)]
    assert np.isnan(parsed.metrics[-2]["loss"])
    assert parsed.damaged == ["metrics.jsonl: 2 damaged lines are ignored"]
    assert parsed.validation == [] and parsed.samples == []
    page = Page(write_report([run], tmp_path / "page"))
    assert ["steps", "41 of 80"] in page.rows and "2 damaged lines" in page.text and not page.sources


def test_a_run_that_passes_over_bad_steps_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "train.bad_steps=skip", samples=())
    with (run / "events.jsonl").open("a") as file:
        file.write('{"step": 41, "event": "not-finite", "grad_norm": NaN, "skipped": true, "clips": []}\n')
    assert read_runs([run])[0].state(time.time()) == "running"


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ({"step": 80, "event": "end"}, "finished"),
        ({"step": 1234, "event": "stop"}, "stopped at step 1,234"),
        ({"step": 41, "event": "not-finite", "loss": float("nan")}, "ended at step 41: the loss is not finite"),
        ({"step": 40, "event": "resume"}, "running"),
    ],
)
def test_the_state_of_a_run(event: dict[str, Any], state: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=())
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    assert read_runs([run])[0].state(time.time()) == state
    assert state in Page(write_report([run], tmp_path / "page")).text


def test_a_silent_run_is_not_called_running(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=())
    for file in run.glob("*.jsonl"):
        os.utime(file, (1e9, 1e9))
    assert read_runs([run])[0].state(1e9 + 60) == "running"
    assert read_runs([run])[0].state(1e9 + 7200) == "nothing logged for 2 h 00 min: stopped, or a long step"


def test_the_newest_events_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=())
    write_lines(run / "events.jsonl", [{"step": step, "event": "spike"} for step in range(1, MAX_EVENTS + 51)])
    page = Page(write_report([run], tmp_path / "page"))
    steps = [int(row[0]) for row in page.rows if "spike" in row]
    assert steps == list(range(MAX_EVENTS + 50, 50, -1)) and " 50 older events are not shown" in page.text


def test_many_sets_of_samples_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=())
    (run / "samples").mkdir()
    for step in range(1, 101):
        Image.fromarray(paint(1)[0]).save(run / "samples" / f"step-{step:08d}.png")
    page = Page(write_report([run], tmp_path / "page"))
    steps = [int(re.findall(r"\d{8}", source)[0]) for source in page.sources]
    assert len(steps) == MAX_CONTACT_SHEETS and steps[0] == 100 and steps[-1] == 1
    assert f"{100 - MAX_CONTACT_SHEETS} more sets of samples" in page.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.4, "59 s"),
        (61, "1 min"),
        (3570, "1 h 00 min"),
        (3599, "1 h 00 min"),
        (18420, "5 h 07 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_times_for_reading(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", samples=())
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([tmp_path / "none"], "none: no such folder"),
        ([tmp_path / "empty"], r"empty: is not a training run: it has no config\.yaml"),
        ([tmp_path / "run", tmp_path / "empty" / ".." / "run"], "run: is given twice"),
        ([], "give the folder of at least one run"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report(folders, tmp_path / "page")
    assert not (tmp_path / "page").exists()
    (tmp_path / "run" / "config.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read as YAML"):
        write_report([tmp_path / "run"], tmp_path / "page")


def test_the_command(run: RunCommand, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", samples=())
    code, out, _ = run("report", folder, "--out", tmp_path / "page")
    assert code == 0 and out.strip() == str(tmp_path / "page" / "index.html")
    code, _, err = run("report", tmp_path / "none")
    assert code == 2 and err == f"error: {tmp_path / 'none'}: no such folder\n"
