"""The chat page in a real Chromium without a window, driven by playwright.

Chromium is the one that playwright has installed (`playwright install chromium`), one on PATH, or the file that the
variable CHROMIUM names: `npm install @sparticuz/chromium` brings one too. The tests are skipped where there is none.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from live_server import Slow, serving
from tiny_chat import write_chat

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
MOST = 30


class Short(Slow):
    def add(self, prompt, max_new_tokens, **options):
        return super().add(prompt, min(max_new_tokens, MOST), **options)


@pytest.fixture(scope="module")
def browser():
    names = "chromium", "chromium-headless-shell", "chromium-browser", "google-chrome"
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no Chromium here: playwright install chromium, or set CHROMIUM")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory, load_once):
    return load_once(write_chat(tmp_path_factory.mktemp("page") / "tiny.gguf"), dtype="float32")


@pytest.fixture(scope="module")
def live(model):
    with serving(model, Short) as live:
        yield live


@pytest.fixture
def page(browser, live):
    """The page, which may neither fail nor ask another host for anything."""
    page = browser.new_page()
    problems, hosts = [], set()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(f"http://127.0.0.1:{live.port}/")
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    assert [problem for problem in problems if "status of 400" not in problem] == []
    assert hosts == {f"127.0.0.1:{live.port}"}
    page.close()


def answers(page):
    return [turn.text_content() for turn in page.query_selector_all(".assistant")]


def test_a_conversation(page, model):
    """Enter sends, the answer is that of Python, its speed is shown, and what was typed is no HTML."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.fill("#temperature", "0")
    page.fill("#text", "<b>Say</b> something.")
    page.press("#text", "Enter")
    expect(page.locator("#status")).to_have_text(re.compile(r"about \d+ tokens, [\d.]+ tokens/s"))
    page.wait_for_selector("#stop", state="hidden")
    talk = [{"role": "user", "content": "<b>Say</b> something."}]
    assert page.query_selector(".user").inner_html() == "&lt;b&gt;Say&lt;/b&gt; something."
    assert answers(page) == [model.chat(talk, MOST, temperature=0).text]
    rate = float(
        re.fullmatch(rf"prompt \d+ tokens, answer {MOST} tokens, ([\d.]+) tokens/s", page.text_content("#status"))[1]
    )
    assert 5 < rate < 20.5  # Slow makes 20 steps a second
    page.fill("#text", "More.")
    page.click("#send")
    expect(page.locator(".assistant")).to_have_count(2)
    page.wait_for_selector("#stop", state="hidden")
    talk += [{"role": "assistant", "content": answers(page)[0]}, {"role": "user", "content": "More."}]
    assert [body["messages"] for body in sent] == [talk[:1], talk]
    assert [body["temperature"] for body in sent] == [0, 0]
    page.click("#clear")
    assert answers(page) == []


def test_stop_frees_the_slot_and_keeps_what_came(page, live):
    page.fill("#text", "Say something.")
    page.click("#send")
    page.wait_for_selector(".assistant")
    page.click("#stop")
    live.wait(lambda worker: worker.live == 0 and not worker.engine.busy)
    page.wait_for_selector("#send", state="visible")
    assert page.text_content("#status").endswith("[stopped]")
    assert len(answers(page)[0]) < MOST


def test_the_model_is_described(page, model):
    title, *table = str(model.summary()).split("\n")
    assert page.text_content("#about") == title
    assert page.text_content("#summary") == "\n".join(table)


def test_an_error_is_shown(page, live):
    page.fill("#text", "x" * 5000)
    page.click("#send")
    page.wait_for_selector(".error")
    assert "tokens" in page.text_content(".error")
    page.fill("#text", "Say something.")
    page.click("#send")
    page.wait_for_selector(".assistant")
    page.click("#stop")


def test_a_key_is_asked_for_once(browser, model):
    with serving(model, key="sesame") as live:
        page = browser.new_page()
        asked = []
        page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept("sesame")))
        page.goto(f"http://127.0.0.1:{live.port}/")
        expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#text", "Say something.")
        page.click("#send")
        page.wait_for_selector(".assistant")
        page.close()
    assert asked == ["API key of this server"]
