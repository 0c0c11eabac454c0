"""A headless Chromium for tests; where there is none, tests fail unless PACELLM_NO_BROWSER=1."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1500",
)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty ``profile`` directory, whose console is kept."""
    named = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    chrome, driver = next(named, None), shutil.which("chromedriver")
    if not chrome or not driver:
        if os.environ.get("PACELLM_NO_BROWSER") == "1":
            pytest.skip("PACELLM_NO_BROWSER=1")
        pytest.fail(
            "chromium and chromedriver are not installed: apt-get install chromium "
            "chromium-driver, or set PACELLM_NO_BROWSER=1 to leave the page untested"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(driver))
    try:
        yield browser
    finally:
        browser.quit()
