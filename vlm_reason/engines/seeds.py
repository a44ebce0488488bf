"""Counter-based seeds: the seed of a sample is a hash of what the sample is, never of when it was drawn.

    seed = blake2b(run seed, stream, policy version, problem id, visit, k, m)  mod 2^63

Nothing depends on batch order, on world size, or on having been interrupted. Python's own `hash` is salted per process
and is therefore never used.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Stream = Literal["prior", "posterior", "answer", "dream", "eval", "order", "init"]


def counter_seed(
    run_seed: int,
    stream: Stream,
    policy_version: int,
    problem_id: str,
    visit: int = 0,
    k: int = 0,
    m: int = 0,
) -> int:
    """63-bit seed of one sample. Fields are length-prefixed by their separator, so ("a", 1) and ("a1",) differ."""
    text = "\x1f".join((str(run_seed), stream, str(policy_version), problem_id, str(visit), str(k), str(m)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
