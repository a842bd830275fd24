"""Training with given frames: the masks of a step, what is noised, what the loss counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import MakeConfig, MakeTransformer, Run

from lavita.core.config import save_config
from lavita.core.processes import Processes
from lavita.models.autoencoder import AutoencoderKL
from lavita.models.flow import make_objective
from lavita.models.given_frames import KINDS, GivenMasks
from lavita.training.batches import Batch, BatchMaker
from lavita.training.config import RunConfig, TrainConfig
from lavita.training.state import TrainState
from lavita.training.step import compute_gradients, losses_of, noised


def make_batch(given: torch.Tensor | None, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    shape = (2, 4, 4, 8, 8)
    return Batch(
        latents=torch.randn(shape, generator=random),
        noise=torch.randn(shape, generator=random),
        timesteps=torch.tensor([0, 700]),
        class_labels=None,
        text_embeds=None,
        given=given,
    )


MASK = torch.tensor([[True, False, False, True], [False, False, False, False]])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_given_frames_have_no_noise(prediction: str) -> None:
    objective = make_objective(prediction)
    batch = make_batch(MASK)
    plain = noised(objective, make_batch(None))
    found = noised(objective, batch)
    assert torch.equal(found[MASK], batch.latents[MASK])
    assert torch.equal(found[~MASK], plain[~MASK])


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_loss_is_the_mean_over_the_other_frames(prediction: str, learn_sigma: bool) -> None:
    if prediction == "flow" and learn_sigma:
        return
    objective, batch = make_objective(prediction), make_batch(MASK)
    random = torch.Generator().manual_seed(9)
    output = torch.randn(2, 4, 8 if learn_sigma else 4, 8, 8, generator=random, requires_grad=True)
    found = losses_of(objective, output, batch)
    for clip, mask in enumerate(MASK):
        others = [
            objective.losses(
                output[clip : clip + 1, place : place + 1],
                batch.latents[clip : clip + 1, place : place + 1],
                batch.timesteps[clip : clip + 1],
                batch.noise[clip : clip + 1, place : place + 1],
            )
            for place in range(4)
            if not mask[place]
        ]
        for part in ("total", "mse", "vlb"):
            expected = torch.stack([getattr(losses, part) for losses in others]).mean()
            torch.testing.assert_close(getattr(found, part)[clip], expected, rtol=1e-5, atol=1e-6)
    found.total.sum().backward()
    gradient = output.grad
    assert gradient is not None
    assert not gradient[MASK].any(), "no gradient from what the model says of given frames"
    assert gradient[~MASK].flatten(1).any(1).all()
    nothing = losses_of(objective, output, make_batch(torch.zeros_like(MASK)))
    whole = losses_of(objective, output, make_batch(None))
    torch.testing.assert_close(nothing.total, whole.total, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up(make_transformer: MakeTransformer) -> None:
    gradients = []
    for accumulation in (1, 2):
        model = make_transformer(num_frames=4, given_frames=list(KINDS))
        settings = TrainConfig(batch_size=2, accumulation=accumulation, precision="fp32")
        state = TrainState.build(model, settings, torch.device("cpu"), Processes())
        compute_gradients(state, make_batch(MASK), settings)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None
        assert (gradient - other).norm() <= 1e-3 * gradient.norm(), name
    marks = gradients[0]["given_embed"]
    assert marks is not None and marks.any()


def maker(config: RunConfig, vae: AutoencoderKL, masks: GivenMasks | None) -> BatchMaker:
    return BatchMaker(config.data, config.train, vae, config.model.class_dropout, None, masks)


def test_masks_come_from_step_and_clip_and_change_no_other_draw(
    make_config: MakeConfig, tiny_vae: AutoencoderKL
) -> None:
    config = make_config("run", "data.num_images=1", "train.batch_size=8")
    masks = GivenMasks(KINDS, 0.2)
    plain, batches = maker(config, tiny_vae, None), maker(config, tiny_vae, masks)
    assert plain.make(3).given is None
    whole = batches.make(3)
    assert whole.given is not None
    assert whole.given.shape == whole.latents.shape[:2] and not whole.given[:, -1].any(), "an image is never given"
    for name in ("latents", "noise", "timesteps", "class_labels"):
        assert torch.equal(getattr(whole, name), getattr(plain.make(3), name)), name
    part = batches.make(3, range(5, 8)).given
    assert part is not None and torch.equal(part, whole.given[5:8])
    drawn = torch.cat([given for step in range(20) if (given := batches.make(step).given) is not None])
    assert 0 < drawn[:, 0].float().mean() < 1


def test_a_run_with_given_frames_goes_on_exactly(run: Run, make_config: MakeConfig) -> None:
    def train(name: str, steps: int) -> str:
        config = make_config(
            name, "model.given_frames=[first,start]", "model.given_dropout=0.1", f"train.steps={steps}"
        )
        save_config(config, config.run_dir.with_suffix(".yaml"))
        code, _, errors = run("train", "--config", config.run_dir.with_suffix(".yaml"))
        assert code == 0, errors
        return (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8")

    def losses(text: str) -> list[Any]:
        return [json.loads(line)["loss"] for line in text.splitlines()]

    whole = losses(train("whole", 4))
    train("parts", 2)
    assert losses(train("parts", 4)) == whole
