"""The report opened in a real headless Chromium: nothing fails, nothing is fetched, the controls do what they say.

$VLM_REASON_SCREENSHOTS names a folder to keep the pictures in, for people to look at.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chromium import Chromium, Page, find_chromium
from tests.report_parts import HOSTILE, hostile, record, store_of, three_kinds, votes
from vlm_reason.evaluation.report import ReportConfig, build, write


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    if find_chromium() is None:
        reason = "no Chromium (bash scripts/browser.sh installs one, as root with apt)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Chromium() as made:
        yield made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems, two tasks, members, rewards, problems out of distribution, hostile text and a title of it."""
    folder = tmp_path_factory.mktemp("report")
    first = store_of(folder / "first", [*three_kinds(), *hostile()])
    second = []
    for r in [r for i in range(24) for r in votes(f"sum/{i}", ["1", "1", "2", "1"], weights="w2")]:
        second.append(r)
    config = ReportConfig(title=f"Report {HOSTILE[0]} {HOSTILE[1]}", items=60)
    ood = store_of(folder / "ood", [r for i in range(12) for r in votes(f"far/{i}", ["1", "2", "3", "4"])])
    write(build([first, store_of(folder / "second", second)], [ood], config), folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def page(browser: Chromium, report: Path) -> Iterator[Page]:
    """Fresh, in a light desktop window. Whatever a test does, nothing may fail in it and nothing may be fetched."""
    opened = browser.open(report.as_uri())
    yield opened
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith("blob:")] == [report.as_uri()]
    assert opened.run("window.hacked") is None
    opened.close()


def shown(page: Page) -> list[str]:
    """What the problems in the list are, in order."""
    return list(page.run("[...document.querySelectorAll('#items > details')].map(d => d.dataset.kind)"))


def click(page: Page, selector: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).click()")


def set_value(page: Page, selector: str, value: str, event: str) -> None:
    page.run(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
        f" e.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def counts(page: Page) -> dict[str, str]:
    return dict(
        page.run(
            "Object.fromEntries([...document.querySelectorAll('[data-filter]')]"
            ".map(b => [b.dataset.filter, b.querySelector('span').textContent]))"
        )
    )


def test_it_opens_whole_and_quietly(page: Page) -> None:
    assert page.run("document.documentElement.dataset.ready") == "true"
    assert page.run("document.querySelector('h1').textContent").startswith(
        "Report </script><script>window.hacked=1"
    )
    assert page.run("document.querySelectorAll('svg.plot').length") >= 8
    assert page.run("document.querySelectorAll('img, iframe, object, embed, link').length") == 0
    assert page.run("document.scripts.length === document.querySelectorAll('script[type]').length + 1")
    said = page.run("document.querySelector('#warnings').textContent")
    assert "Only 24 problems" in said
    hidden = (
        "[...document.querySelectorAll('svg.plot')].filter(s => s.getBoundingClientRect().width < 200).length"
    )
    assert page.run(hidden) == 0


def test_the_filters_tell_the_three_failures_apart(page: Page) -> None:
    set_value(page, "#pick-system", "0", "change")
    set_value(page, "#pick-task", "0", "change")
    assert counts(page) == {"all": "24", "wrong_confident": "5", "not_chosen": "4", "never_sampled": "4"}
    click(page, "[data-filter=wrong_confident]")
    assert sorted(shown(page)) == ["never_sampled"] * 2 + ["not_chosen"] * 3
    set_value(page, "#sure", "90", "input")
    assert shown(page) == ["never_sampled"] * 2
    click(page, "[data-filter=not_chosen]")
    assert shown(page) == ["not_chosen"] * 4
    click(page, "[data-filter=never_sampled]")
    assert shown(page) == ["never_sampled"] * 4
    assert (
        page.run("document.querySelector('[data-filter=never_sampled]').getAttribute('aria-pressed')")
        == "true"
    )
    assert page.run("document.querySelector('#shown').textContent") == "4 of 53 problems shown"


def test_search_reads_questions_answers_and_texts(page: Page) -> None:
    for text, found in (
        ("sum/17?", 2),
        ("SUM/17", 2),
        ("xss", 0),
        ("onerror=", 1),
        ("⟨RLO⟩reversed", 1),
        ("", 53),
    ):
        set_value(page, "#search", text, "input")
        assert len(shown(page)) == found, text
    set_value(page, "#search", "no such words", "input")
    assert page.run("document.querySelector('#shown').textContent").startswith("No problem fits")


def test_the_list_is_put_in_order(page: Page) -> None:
    order = "[...document.querySelectorAll('#items .sure')].map(e => parseInt(e.textContent))"
    set_value(page, "#sort", "sure_down", "change")
    down = page.run(order)
    assert down == sorted(down, reverse=True) and len(set(down)) > 2
    set_value(page, "#sort", "sure_up", "change")
    assert page.run(order) == sorted(down)


def test_a_problem_opens_with_the_keyboard_and_shows_its_texts_as_text(page: Page) -> None:
    set_value(page, "#search", "onerror=", "input")
    page.run("document.querySelector('#items summary').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#items details').open")
    page.wait("document.querySelector('#items table.rationales')")
    words = page.run("document.querySelector('#items .words').textContent")
    assert HOSTILE[0] in words and page.run("document.querySelectorAll('#items img').length") == 0
    assert page.run("document.querySelector('#items mark').textContent") in ("1", HOSTILE[0])
    page.press("Tab")
    assert page.run("document.activeElement.closest('table.rationales') !== null")


def test_a_column_of_rationales_sorts_both_ways(page: Page) -> None:
    set_value(page, "#search", "sum/17?", "input")
    page.run("document.querySelector('#items details').open = true")
    page.wait("document.querySelector('#items table.rationales')")
    table = "document.querySelector('#items details table')"
    ranks = f"[...{table}.tBodies].map((b) => +b.rows[0].cells[0].textContent)"
    assert page.run(ranks) == [1, 2, 3, 4]
    header = f"[...{table}.querySelectorAll('th button')].find((b) => b.textContent === 'verdict')"
    page.run(f"{header}.click()")
    assert page.run(ranks)[0] == 4  # the right one
    page.run(f"{header}.click()")
    assert page.run(ranks)[-1] == 4
    assert page.run(f"{header}.closest('th').getAttribute('aria-sort')") == "ascending"


def test_the_data_of_a_plot_can_be_taken_away(page: Page) -> None:
    page.run(
        "window.taken = [];"
        "URL.createObjectURL = (blob) => { blob.text().then((t) => window.taken.push(t)); return '#'; }"
    )
    click(page, "button[data-download]")
    page.wait("window.taken.length === 1")
    assert sum(json.loads(page.run("window.taken[0]"))["n"]) == 24


def test_members_are_shown_side_by_side(browser: Chromium, tmp_path: Path) -> None:
    records = [
        record(
            f"q/{i}", k, str(1 + (m + k) % 2), (m + k) % 2 == 0, member=m, weights=f"w{m}", reward=float(k)
        )
        for i in range(6)
        for m in range(3)
        for k in range(2)
    ]
    write(build([store_of(tmp_path / "s", records)]), tmp_path / "r.html")
    page = browser.open((tmp_path / "r.html").as_uri())
    page.run("document.querySelector('#items details').open = true")
    page.wait("document.querySelector('#items table.heat')")
    assert (
        page.run("[...document.querySelectorAll('#items table.heat td')].map(t => t.textContent)")
        == ["50 %"] * 6
    )
    assert page.errors == []
    page.close()


def size(png: bytes) -> tuple[int, int]:
    return struct.unpack(">II", png[16:24])  # type: ignore[return-value]


def test_light_dark_phone_and_print(page: Page, tmp_path: Path) -> None:
    keep = os.environ.get("VLM_REASON_SCREENSHOTS")  # of the whole page, which takes seconds each
    folder = Path(keep or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    background = "getComputedStyle(document.body).backgroundColor"
    click(page, "#items summary")
    light = page.screenshot(folder / "light.png", bool(keep))
    assert page.run(background) == "rgb(255, 255, 255)"
    page.look(scheme="dark")
    dark = page.screenshot(folder / "dark.png", bool(keep))
    assert page.run(background) == "rgb(20, 22, 26)"
    assert size(light) == size(dark) and light != dark and size(light)[0] == 1280
    page.look(width=390, height=844)
    phone = page.screenshot(folder / "phone.png", bool(keep))
    assert page.run("document.documentElement.scrollWidth") == 390 and size(phone)[0] == 390
    page.look(media="print", scheme="dark", width=720)
    page.screenshot(folder / "print.png", bool(keep))
    assert page.run(background) == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
    page.pdf(folder / "report.pdf")
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")


CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(c[i] / 255), 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('script, noscript')) continue;
    const svg = e.closest('svg') !== null;
    const front = parse(svg ? getComputedStyle(e).fill : getComputedStyle(e).color);
    const [a, b] = [luminance(front), luminance(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${e.tagName}.${e.getAttribute('class')}: ${e.textContent}`);
  }
  return [...new Set(low)];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_readers_need(page: Page, scheme: str) -> None:
    """4.5 : 1 (WCAG 2, AA), against the background behind it."""
    page.look(scheme=scheme)
    click(page, "#open-all")
    page.wait("document.querySelectorAll('table.rationales').length > 10")
    assert page.run(CONTRAST) == []
