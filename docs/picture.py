"""Photograph the top of the demo's report with Chromium: docs/report.png. Command: make picture."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto((ROOT / ".demo" / "report.html").as_uri())
    page.screenshot(path=ROOT / "docs" / "report.png")
    browser.close()
