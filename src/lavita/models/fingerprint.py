"""Hash of a model's configuration and weights."""

from __future__ import annotations

import hashlib
import json

from diffusers.models.modeling_utils import ModelMixin


def fingerprint(model: ModelMixin) -> str:
    """SHA-256 of a diffusers model's configuration and weights in float32: equal models have equal fingerprints."""
    digest = hashlib.sha256()
    public = {key: value for key, value in model.config.items() if not key.startswith("_")}
    digest.update(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
