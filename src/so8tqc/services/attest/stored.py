"""What a file of weights stores, tensor by tensor, and where it differs from what was stated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from so8tqc.checkpoints.baking import sha256_tensor
from so8tqc.checkpoints.safetensors_index import read_header
from so8tqc.disk.digests import sha256_model
from so8tqc.errors import So8tqcError
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.gguf.rewrite import key_values
from so8tqc.services.attest.statement import Annotations, Digest, Resource, StoredTensor
from so8tqc.services.quantize.derivation import tensor_digests

BETWEEN = "its header, or bytes between tensors"


def resource(path: Path, name: str) -> Resource:
    """Digest of a file, and of all that it stores if it is one of weights.

    Raises:
        ModelError: it has the name of a file of weights and is none.
    """
    return Resource(name=name, digest=Digest(sha256=sha256_model(path)), annotations=stored(path))


def stored(path: Path) -> Annotations | None:
    """Every tensor and key of a safetensors or GGUF file; None for another file.

    Raises:
        ModelError: damaged.
    """
    if is_gguf(path):
        file = open_gguf(path)
        digests = tensor_digests(file)
        keys = {key: hashlib.sha256(value).hexdigest() for key, value in key_values(path).items()}
        tensors = {
            name: StoredTensor(dtype=tensor.type, shape=tensor.shape, sha256=digests[name])
            for name, tensor in file.tensors.items()
        }
        return Annotations(tensors=tensors, keys=keys)
    if path.suffix == ".safetensors":
        entries = read_header(path)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            hashes = list(pool.map(sha256_tensor, entries))
        return Annotations(
            tensors={
                entry.name: StoredTensor(dtype=entry.dtype, shape=entry.shape, sha256=sha256)
                for entry, sha256 in zip(entries, hashes, strict=True)
            }
        )
    return None


def differing_parts(path: Path, stated: Resource) -> list[str]:
    """Tensors and keys of a file that are not as stated; [] if its bytes are those stated.

    A file without tensors is one part. A difference outside tensors and keys is named so.
    """
    if sha256_model(path) == stated.digest.sha256:
        return []
    if stated.annotations is None:
        return ["its bytes"]
    try:
        found = stored(path)
    except So8tqcError as error:
        return [f"unreadable: {error.what}"]
    if found is None:
        return ["its bytes"]
    parts = _differing(stated.annotations.tensors, found.tensors)
    parts += [f"key {key}" for key in _differing(stated.annotations.keys, found.keys)]
    return parts or [BETWEEN]


def _differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
