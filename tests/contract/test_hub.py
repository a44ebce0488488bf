"""compat/hub.py: the libraries' own offline switch works in the middle of a process, and is put back."""

from __future__ import annotations

import urllib.error
import urllib.request

import datasets
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from vlm_reason.compat.hub import hub_answers, hub_offline


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_hub_clients_do_not_try_inside_the_block(online) -> None:
    with hub_offline(True):
        with pytest.raises(OfflineModeIsEnabled):
            HfApi().model_info("a/b")
        with pytest.raises(ConnectionError, match="OfflineModeIsEnabled"):
            datasets.load_dataset("no-such/set")
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)
    with hub_offline(False):
        assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (urllib.error.URLError("refused"), False),
        (TimeoutError(), False),
        (urllib.error.HTTPError("", 405, "", {}, None), True),
    ],
)
def test_the_hub_is_asked_once(online, monkeypatch, answer, reachable) -> None:
    asked: list[str] = []

    def urlopen(request: urllib.request.Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert hub_answers() is reachable and asked == [constants.ENDPOINT]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers() and len(asked) == 1
