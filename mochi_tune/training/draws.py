"""Random numbers keyed by what they are for, never by when or where they are drawn.

A draw depends on (seed, purpose, step, sample) alone. So a resumed run, another number of processes and another
order of evaluation draw the same numbers, and there is no generator state to save.
"""

import hashlib

import torch


def key_seed(seed: int, *key: str | int) -> int:
    """Returns a 63-bit seed of the key; different keys give unrelated seeds."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """Returns a CPU generator seeded by the key."""
    return torch.Generator().manual_seed(key_seed(seed, *key))


def draws_proof(seed: int) -> str:
    """Returns the sha256 of one draw of each kind: what a torch that draws other numbers would not give."""
    generator = keyed_generator(seed, "proof")
    drawn = (torch.rand(17, generator=generator), torch.randn(999, generator=generator))
    order = torch.randperm(99, generator=generator)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in (*drawn, order))).hexdigest()
