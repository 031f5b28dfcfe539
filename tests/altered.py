"""Prior files that somebody changed and sealed again, so that what stands behind the seal can be tested."""

import json
from pathlib import Path

from safetensors.torch import load, save

from pnpda_nb.core.disk import BLANK, sealed


def altered(path: Path, new: Path, change=lambda tensors: None, **texts) -> Path:
    """A copy of a prior file with some texts of its header changed (None: left out), and its tensors, under a seal of its own."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"] | texts
    tensors = load(content)
    change(tensors)
    return with_seal(tensors, {k: v for k, v in header.items() if v is not None}, new)


def with_seal(tensors: dict, metadata: dict, new: Path) -> Path:
    """A sealed safetensors file of any tensors and metadata."""
    new.write_bytes(sealed(save({k: v.clone() for k, v in tensors.items()}, metadata=metadata | {"seal": BLANK.decode()})))
    return new
