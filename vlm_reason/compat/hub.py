"""The Hugging Face hub, when it may be out of reach: ask once, then look only at what is already here.

Left alone, its clients try an unreachable hub for most of a minute, a warning a try, before they look at their cache.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


def hub_answers() -> bool:
    """One request without retries. False in offline mode."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except urllib.error.URLError as error:
        # it is there; the hub client has certificates of its own
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """With `offline`, hub clients of this process use their caches alone inside the block, as under HF_HUB_OFFLINE=1
    (which they read at import). Not for threads: the switch is the libraries' own module variable."""
    from datasets import config

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if offline:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
