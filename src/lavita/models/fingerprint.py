"""Hash of a model's configuration and weights."""

from __future__ import annotations

import hashlib
import json

from diffusers.models.modeling_utils import ModelMixin

LATER_FIELDS = {"flow_shift", "latent_mean", "latent_std"}
"""Fields of the transformer that its first models did not have; their default is None."""


def fingerprint(model: ModelMixin) -> str:
    """SHA-256 of a diffusers model's configuration and weights in float32: equal models have equal fingerprints.

    A field of `LATER_FIELDS` counts only if it is set, so that the models from before it keep their fingerprints.
    """
    digest = hashlib.sha256()
    public = {
        key: value
        for key, value in model.config.items()
        if not key.startswith("_") and not (key in LATER_FIELDS and value is None)
    }
    digest.update(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
