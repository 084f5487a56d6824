"""Makes docs/server.png, the chat page while a model talks.

jaxllm serve --model demo --port 8000 &
CHROMIUM=/path/to/chromium python tests/reference/serving_picture.py http://127.0.0.1:8000/
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 800, "height": 460})
    page.goto(sys.argv[1])
    page.fill("#temperature", "0")
    for question in "What is the capital of France?", "Tell me three facts about it.":
        page.fill("#text", question)
        page.press("#text", "Enter")
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden(timeout=600_000)
    page.screenshot(path=Path(__file__).parents[2] / "docs" / "server.png")
    browser.close()
