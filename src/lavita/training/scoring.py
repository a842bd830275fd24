"""Scores during training: an evaluation with a small fixed protocol, in memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lavita.core.processes import Processes
from lavita.core.seeds import generator
from lavita.data.clips import clip_span
from lavita.evaluation.clips import choose_clips
from lavita.evaluation.distances.kernel import MIN_SAMPLES, kernel_score
from lavita.evaluation.feature_metrics import FEATURE_METRICS, score_name
from lavita.evaluation.features.compute import BATCH_SIZE, compute_outputs
from lavita.evaluation.features.extractors import get_extractor
from lavita.evaluation.features.networks import Network, load_network
from lavita.evaluation.sources import VideoFolder
from lavita.sampling.pipeline import LavitaPipeline


@dataclass(frozen=True)
class TrackingOptions:
    """A protocol that is small enough to be repeated during training."""

    num_clips: int = 64
    """Number of real clips, and of samples."""
    steps: int = 20
    """Steps of the sampler."""
    guidance_scale: float = 1.0
    seed: int = 0
    """Seed of the choice of real clips; the samples have the seeds 0, 1, ..."""
    video_extractor: str = "efficientnet_lite0_video"


class TrainingScorer:
    """Scores a pipeline against the same real clips each time.

    The score is the kernel distance, whose expectation does not depend on the number of clips; a Frechet distance of 64
    clips would mostly measure its bias. Compare scores within a run: `lavita evaluate` uses other clips.
    """

    def __init__(
        self,
        real: Path,
        num_frames: int,
        frame_interval: int,
        resolution: int,
        options: TrackingOptions | None = None,
        device: torch.device | str = "cpu",
        team: Processes | None = None,
    ) -> None:
        """Reads the real clips and computes their features, once.

        Args:
            real: folder of real videos.
            num_frames: F, frames of a clip.
            frame_interval: distance of the frames in the video.
            resolution: side of the frames in pixels.
            options: the protocol; by default `TrackingOptions()`.
            device: device of the extractor.
            team: the processes, which share the sampling.

        Raises:
            ValueError: if there are too few videos, or the weights of the extractor are missing.
        """
        self.options, self.resolution, self._team = options or TrackingOptions(), resolution, team or Processes()
        if self.options.num_clips < MIN_SAMPLES:
            raise ValueError(f"num_clips is {self.options.num_clips}; it must be at least {MIN_SAMPLES}")
        self._extractor = get_extractor("video_extractor", self.options.video_extractor, "clip")
        self._network: Network = load_network(self._extractor.network, device=device)
        # The training run has already named the videos that it leaves out.
        source = VideoFolder(real).usable(clip_span(num_frames, frame_interval), skip_broken=True)
        count, seed = self.options.num_clips, self.options.seed
        side = choose_clips(source, count, num_frames, frame_interval, seed, field="train.score_clips")
        if (num_videos := len({clip.name for clip in side.clips})) < MIN_SAMPLES:
            raise ValueError(f"{real}: {num_videos} usable videos; a kernel distance needs {MIN_SAMPLES}")
        outputs = compute_outputs(side, [self._network], resolution)[self._network.spec.name]
        self._real = np.concatenate([self._extractor.read(row[None]) for row in outputs])
        self._videos = [clip.name for clip in side.clips]

    @torch.no_grad()
    def __call__(self, pipeline: LavitaPipeline) -> dict[str, float]:
        """Samples the pipeline with fixed seeds and scores the frames as they are.

        Args:
            pipeline: of a model without texts; the samples go through the classes in turn. The mode of the transformer
                (training or not) is restored.

        Returns:
            `{name: distance, f"{name}_standard_error": its standard error}`; empty if samples are not finite.

        Raises:
            ValueError: for a model with texts.
        """
        num_classes = pipeline.transformer.config["num_classes"]
        features: list[npt.NDArray[np.float32] | None] = []
        if pipeline.transformer.config["text_dim"]:
            raise ValueError("a model with texts cannot be scored during training: it has no prompts to be scored on")
        pipeline.set_progress_bar_config(disable=True)
        training = pipeline.transformer.training
        pipeline.transformer.eval()
        starts = list(range(0, self.options.num_clips, BATCH_SIZE))
        for first in self._team.share(starts):
            seeds = range(first, min(first + BATCH_SIZE, self.options.num_clips))
            try:
                frames = pipeline(
                    class_labels=[seed % num_classes for seed in seeds] if num_classes else None,
                    num_videos=len(seeds),
                    num_inference_steps=self.options.steps,
                    guidance_scale=self.options.guidance_scale if num_classes else 1.0,
                    generator=[generator(seed, "sample") for seed in seeds],
                ).frames
            except FloatingPointError as error:  # of a young model, or in fp16: no reason to end the run
                print(f"no score: {error}", file=sys.stderr)
                features.append(None)
                continue
            output = self._network.run(torch.from_numpy(np.asarray(frames))).float().cpu().numpy()
            features.append(self._extractor.read(output))
        pipeline.transformer.train(training)
        collected = self._team.collect(features)
        finite = [part for part in collected if part is not None]
        if len(finite) < len(collected):
            return {}
        score = kernel_score(self._real, np.concatenate(finite), self._videos)
        name = score_name(FEATURE_METRICS["kernel-video"], self._extractor)
        return {name: score.value, f"{name}_standard_error": score.standard_error}
