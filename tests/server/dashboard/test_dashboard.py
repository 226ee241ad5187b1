"""The dashboard in a real browser: open it, see a job appear, pause it, see it paused.

Chromium is playwright's own (`playwright install chromium`), the system's, or FLEXLLM_CHROMIUM.
"""

import os
import re
import shutil
import threading

import pytest

from tests.engines import letter_rows, write_rows
from tests.server.running import KEY

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")


@pytest.fixture(scope="module")
def page():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium
        own = chromium.executable_path if os.path.exists(chromium.executable_path) else None
        found = filter(
            None, [os.environ.get("FLEXLLM_CHROMIUM"), own, *map(shutil.which, BROWSERS)]
        )
        path = next(found, None)
        if path is None:
            pytest.skip("no Chromium: run `playwright install chromium`")
        browser = chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1200, "height": 900})
        browser.close()


def test_a_job_is_seen_paused_and_cancelled(server, client, page, tmp_path):
    expect = sync_api.expect
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url + "/dashboard")
    expect(page.locator("#health")).to_have_text("needs an API key")
    page.fill("#key-value", KEY)
    page.click("#key button")
    expect(page.locator("#health")).to_have_text("healthy")
    expect(page.locator("#adapters")).to_contain_text("random")

    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    file = client.files.create(file=rows, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        suffix="seen",
        extra_body={"lora_rank": 4, "batch_tokens": 150, "max_steps": 5000},
    )
    row = page.locator(f'tr[data-job="{job.id}"]')
    expect(row.locator(".status")).to_have_text("running", timeout=20_000)
    shown = threading.Event()

    def ask():
        while not shown.is_set():
            client.completions.create(model="tiny", prompt="a" * 40, max_tokens=60)

    traffic = threading.Thread(target=ask)
    traffic.start()
    try:
        _check_numbers(page, row)
    finally:
        shown.set()
        traffic.join()
    page.screenshot(path=os.environ.get("FLEXLLM_SCREENSHOT", str(tmp_path / "dashboard.png")))
    page.set_viewport_size({"width": 400, "height": 900})  # a phone: nothing is wider than it
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert row.get_by_role("button", name="pause").bounding_box()["x"] < 320
    row.get_by_role("button", name="pause").click()
    expect(row.locator(".status")).to_have_text("paused")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    row.get_by_role("button", name="resume").click()
    expect(row.locator(".status")).to_have_text("running")
    row.get_by_role("button", name="cancel").click()
    expect(row.locator(".status")).to_have_text("cancelled")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    expect(row.get_by_role("button")).to_have_count(0)
    assert not errors
    assert all(url.startswith(server.url) for url in requests), requests


def _check_numbers(page, row):
    expect = sync_api.expect
    expect(row.locator("polyline")).to_have_count(1)
    expect(page.locator("#chart polyline")).to_have_count(6)  # three lines, three of the grid
    expect(page.locator("#top")).to_have_text(re.compile(r"^[1-9][\d,]*$"))  # of its axis
    expect(row.locator(".steps")).to_have_text(re.compile(r"^[1-9]\d* / 5000"))
    expect(page.locator("#tokens")).to_have_text(re.compile(r"^[1-9]"))
    expect(page.locator("#pages")).to_have_text(re.compile(r"^[1-9]\d* / 48$"))
    expect(page.locator("#classes tr").first).to_contain_text("% of")
