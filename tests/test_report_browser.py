"""The report in a headless Chromium: nothing is fetched or refused, clips play, nothing is wider than a phone."""

from pathlib import Path

import numpy as np
import pytest

from hvlite.report.entries import Entry
from hvlite.report.page import Report, write_report
from hvlite.video.mp4 import write_mp4
from tests.browser import find_browser, opened_page

BROWSER = find_browser()
PLAY = """(async () => {
  const video = document.querySelector("video");
  video.muted = true;
  await video.play();
  return [video.videoWidth, video.videoHeight];
})()"""
EVIL = "<script>document.title = 'taken'</script><img src='https://example.invalid/x.png' onerror='alert(1)'>"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: chromium-headless-shell)")
def test_a_page_from_disk(tmp_path: Path) -> None:
    assert BROWSER is not None
    folder = tmp_path / "50% of it's #1 & more?"
    folder.mkdir()
    clip = folder / "a clip.mp4"
    write_mp4(clip, np.full((9, 32, 48, 3), 90, np.uint8), metadata="{}", title="")
    long_word = "long" * 200
    entries = [
        Entry(name="one", state="done", prompt=EVIL, kind=long_word, clip=clip, timings={long_word: 1.0}),
        Entry(name=long_word, state="failed", prompt=long_word, kind="k", error=EVIL, settings={"x": long_word}),
    ]
    page = tmp_path / "report.html"
    assert list(write_report(page, Report(title="a night", entries=entries))) == [1, 2]
    with opened_page(BROWSER, tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.evaluate(PLAY) == [48, 32]
        assert browser.evaluate("document.title") == "a night"
        assert browser.evaluate("[...document.images].map(each => each.naturalWidth)") == [48] * 4
        assert browser.evaluate("getComputedStyle(document.querySelector('article')).borderRadius") == "8px"
        for width in (1200, 360):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.call("Emulation.setDeviceMetricsOverride", **metrics)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
        colours = set()
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.call("Emulation.setEmulatedMedia", features=features)
            colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
        asked = {each["request"]["url"].split(":")[0] for each in browser.events("Network.requestWillBeSent")}
        assert asked == {"file", "data"}
        assert [each["entry"]["text"] for each in browser.events("Log.entryAdded")] == []
