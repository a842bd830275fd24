"""Hash of a model's configuration and weights."""

from __future__ import annotations

import hashlib
import json

from diffusers.models.modeling_utils import ModelMixin

LATER_FIELDS = {
    *("action_names", "flow_shift", "given_frames", "latent_mean", "latent_std", "text_tokens", "trained_shapes"),
}
"""Fields of the transformer that its first models did not have; their default is None."""


def fingerprint(model: ModelMixin, parts: tuple[str, ...] = ("",)) -> str:
    """SHA-256 of a diffusers model's configuration and weights in float32: equal models have equal fingerprints.

    A field of `LATER_FIELDS` counts only if it is set, so that the models from before it keep their fingerprints.

    Args:
        model: the model.
        parts: what the names of the weights that count begin with; by default all count.
    """
    digest = hashlib.sha256()
    public = {
        key: value
        for key, value in model.config.items()
        if not key.startswith("_") and not (key in LATER_FIELDS and value is None)
    }
    digest.update(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(parts):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_fingerprint(vae: ModelMixin) -> str:
    """The fingerprint of what an autoencoder's latents depend on: equal for two that differ in the decoder alone."""
    parts = ("encoder.", "quant_conv.")
    return fingerprint(vae, (*parts, *(f"network.{part}" for part in parts)))  # a causal one has those of its network
