"""Publishing a pipeline on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from lavita.core.text import read_text
from lavita.models.hub import why_refused
from lavita.sampling.model_card import read_facts, write_card
from lavita.sampling.pipeline import load_pipeline
from lavita.sampling.pipeline_parts import PART_FILES, PIPELINE_CLASS, PIPELINE_FILES

Report = Mapping[str, Any]


def push(
    source: Path,
    repo: str,
    private: bool = False,
    license_name: str | None = None,
    title: str | None = None,
    scores: Path | None = None,
    message: str = "Pipeline of LAVITA",
) -> str:
    """Uploads a pipeline with its model card, in one commit: a repository is never half-updated.

    An upload that was interrupted goes on where it was when it is repeated. Files of an older pipeline that the new one
    does not have are removed in the same commit; other files of the repository stay.

    Args:
        source: folder of a pipeline, or of a run with one.
        repo: hub id; the repository is made if there is none.
        private: make a new repository private.
        license_name: licence of the weights for the card, such as `apache-2.0`; by default the one that was stated
            before.
        title: heading of the card.
        scores: report of `lavita evaluate`, for the card.
        message: message of the commit.

    Returns:
        Address of the commit.

    Raises:
        ValueError: if there is no whole pipeline, the repository holds something else, or the hub refuses.
    """
    folder = source / "pipeline" if (source / "pipeline" / "model_index.json").exists() else source
    load_pipeline(folder)  # nothing damaged is published
    found = None if scores is None else report_scores(scores)
    facts = read_facts(folder).changed(license=license_name, title=title, scores=found)
    write_card(folder, facts)
    api = HfApi()
    try:
        _check_repository(api, repo)
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=[*PIPELINE_FILES, "pipeline.py"],
            delete_patterns=list(PART_FILES),
        )
    except HFValidationError as error:
        raise ValueError(f"repository is {repo!r}, but must be a hub id such as name/model ({error})") from error
    except ValueError:
        raise
    except Exception as error:  # each version of the library has its own kinds
        why = why_refused(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{repo}: cannot be uploaded to {constants.ENDPOINT} ({why}); the repository is as it was, and the same "
            "command goes on"
        ) from error
    return str(done.commit_url)


def _check_repository(api: HfApi, repo: str) -> None:
    """Raises a ValueError if a repository exists and holds something else than a pipeline."""
    try:
        files = set(api.list_repo_files(repo)) - {".gitattributes", "README.md"}
    except RepositoryNotFoundError:
        return
    if not files:
        return
    name = None
    if "model_index.json" in files:
        index = json.loads(read_text(Path(api.hf_hub_download(repo, "model_index.json"))))
        name = index.get("_class_name") if isinstance(index, dict) else None
    if name != PIPELINE_CLASS:
        held = ", ".join(sorted(files)[:3])
        raise ValueError(f"{repo}: exists and holds something else ({held}, ...); give another name")


def report_scores(file: Path) -> list[dict[str, str]]:
    """The scores in a report of `lavita evaluate`, as rows of a card.

    Raises:
        ValueError: if it is no such report.
    """
    try:
        report = json.loads(read_text(file))
        rows = [_score_row(name, score, report["protocol"]) for name, score in report.get("scores", {}).items()]
        if "accuracy" in report:
            row = report["accuracy"]
            low, high = row["interval_95"]
            interval = f"{low:.1%} to {high:.1%}"
            rows.append({"metric": "class accuracy", "value": f"{row['accuracy']:.1%}", "95% interval": interval})
        if "motion" in report:
            row = report["motion"]
            within = f"{row['num_within_factor_two']} of {row['num_classes']} classes"
            rows.append({"metric": "motion within a factor of 2", "value": within})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as a report of lavita evaluate ({error!r})") from error
    if not rows:
        raise ValueError(f"{file}: holds no scores")
    return rows


def _score_row(name: str, score: Report, protocol: Report) -> dict[str, str]:
    row = {"metric": name}
    if "value" in score:
        row["value"] = f"{score['value']:.4g}"
    else:  # precision, recall, density and coverage
        row["value"] = ", ".join(
            f"{key} {score[key]:.3f}" for key in ("precision", "recall", "density", "coverage") if key in score
        )
    if score.get("interval_95"):
        row["95% interval"] = "{:.4g} to {:.4g}".format(*score["interval_95"])
    if isinstance(score.get("floor"), (int, float)):
        row["real clips against real ones"] = f"{score['floor']:.4g}"
    row["protocol"] = (
        f"{score['num_generated']:,} generated and {score['num_real']:,} real clips of {protocol['num_frames']} frames "
        f"at interval {protocol['frame_interval']}, {protocol['resolution']} pixels"
    )
    return row
