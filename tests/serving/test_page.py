"""The chat page in Chromium, driven by Playwright, against a server of this process."""

import base64
import json
import re
import shutil
import threading

import pytest

from llava_jax.inference.answer import Answer
from tests.serving.live_server import LiveServer, data_url

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

# Without these Chromium asks hosts outside at every start.
OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PNG = base64.b64decode(data_url(0, (60, 40)).partition(",")[2])
DROP = """(data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
  return transfer;
}"""


@pytest.fixture(scope="module")
def live(model):
    live = LiveServer(model, explanations=True)
    yield live
    live.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, live, request):
    """An opened page, which in the end must have written no error to the console."""
    context = browser.new_context(**getattr(request, "param", {}))
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=live.url)
    page = context.new_page()
    page.set_default_timeout(30_000)
    faults = []
    page.on(
        "console", lambda message: faults.append(message.text) if message.type == "error" else 0
    )
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(live.url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    context.close()
    assert not [fault for fault in faults if "status of 4" not in fault]


def limit(page, tokens: int) -> None:
    page.evaluate(f"document.getElementById('max_tokens').value = {tokens}")


def ask(page, text: str) -> None:
    count = page.locator(".turn.assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    sync_api.expect(page.locator(".turn.assistant")).to_have_count(count + 1)
    page.wait_for_selector("#send:enabled")


def answers(page) -> list[str]:
    return page.locator(".turn.assistant .body").all_inner_texts()


def add_picture(page, name: str = "a.png") -> None:
    count = page.locator("#tray .shot").count()
    page.set_input_files("#files", {"name": name, "mimeType": "image/png", "buffer": PNG})
    sync_api.expect(page.locator("#tray .shot")).to_have_count(count + 1)


def test_a_question_about_pictures_is_answered_as_by_python(page, live):
    add_picture(page, "a.png")
    data = base64.b64encode(PNG).decode()
    transfer = page.evaluate_handle(DROP, data)
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    sync_api.expect(page.locator("#tray .shot")).to_have_count(2)
    paste = f"new ClipboardEvent('paste', {{ clipboardData: ({DROP})(data) }})"
    page.evaluate(f"(data) => document.dispatchEvent({paste})", data)
    sync_api.expect(page.locator("#tray .shot")).to_have_count(3)
    page.locator("#tray button").first.click()
    limit(page, 9)
    ask(page, "what?")
    expected = live.model.chat("what?", [PNG, PNG], max_tokens=9)
    assert answers(page)[0].split() == expected.split()
    assert page.locator(".turn.user img").count() == 2
    assert "first token" in page.locator(".turn.assistant .facts").inner_text()


def test_an_answer_of_one_token_shows_how_many_tokens_it_took(page):
    limit(page, 1)
    ask(page, "what?")
    sync_api.expect(page.locator(".turn.assistant .facts")).to_have_text(
        re.compile(r"first token [\d.]+ s, \d+ \+ 1 tokens")
    )


def test_regenerate_edit_and_branches(page):
    limit(page, 4)
    ask(page, "one")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector("text=2/2")
    page.wait_for_selector("#send:enabled")
    page.get_by_role("button", name="Previous version").click()
    page.wait_for_selector("text=1/2")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit question").fill("another")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".turn.user .body")).to_have_text("another")
    page.wait_for_selector("#send:enabled")
    page.get_by_role("button", name="Previous version").first.click()
    sync_api.expect(page.locator(".turn.user .body")).to_have_text("one")


def test_stop_frees_the_row(page, live, monkeypatch):
    device, began, stopped = live.model.engine.device, threading.Event(), threading.Event()
    decode, before = device.decode, live.model.engine.counts.answer_tokens
    cancel = Answer.cancel

    def held_decode(*args):
        began.set()
        stopped.wait(30)
        return decode(*args)

    monkeypatch.setattr(device, "decode", held_decode)
    monkeypatch.setattr(Answer, "cancel", lambda answer: (cancel(answer), stopped.set()))
    limit(page, 100)
    page.evaluate(
        """() => { const plain = window.fetch; window.fetch = (url, options) => {
          if (options?.body) options.body = options.body.replace("{", '{"ignore_eos":true,');
          return plain(url, options); }; }"""
    )
    page.fill("#text", "long")
    page.press("#text", "Enter")
    page.wait_for_selector("#halt:enabled")
    assert began.wait(30)
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    live.wait_idle()
    assert "stopped" in page.locator(".turn.assistant .facts").inner_text()
    assert live.model.engine.counts.answer_tokens - before < 60  # of 67 that have room


def test_history_survives_a_reload_and_goes_through_a_file(page, tmp_path):
    limit(page, 4)
    add_picture(page)
    ask(page, "remember me")
    said = answers(page)
    page.reload()
    page.wait_for_selector(".turn.assistant")
    assert answers(page) == said and page.locator(".turn.user img").count() == 1
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "chats.json")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete remember me").click()
    sync_api.expect(page.locator(".turn")).to_have_count(0)
    page.set_input_files("#importFile", tmp_path / "chats.json")
    page.wait_for_selector(".turn.assistant")
    assert answers(page) == said
    page.set_input_files(
        "#importFile", {"name": "x.json", "mimeType": "application/json", "buffer": b"{}"}
    )
    page.wait_for_selector("text=no export of chats")


def test_boxes_are_drawn_on_the_picture(page, live):
    """With an answer that has a box: the model of this test writes none."""
    reply = {"choices": [{"index": 0, "delta": {"content": "It is at [0.25, 0.5, 0.75, 0.75]."},
                          "finish_reason": "stop"}]}  # fmt: skip
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body=f"data: {json.dumps(reply)}\n\ndata: [DONE]\n\n",
        ),
    )
    add_picture(page)
    ask(page, "where?")
    box = page.locator(".turn.user rect")
    drawn = [float(box.get_attribute(name)) for name in ("x", "y", "width", "height")]
    side = {"pad": 60, "square": 40}[live.model.config.image.mode]
    left, top = (side - 60) / 2, (side - 40) / 2
    assert drawn == [0.25 * side - left, 0.5 * side - top, 0.5 * side, 0.25 * side]


def test_where_the_model_looked_is_drawn_over_the_picture(page, live):
    limit(page, 4)
    ask(page, "without a picture?")
    assert page.get_by_role("button", name="Where did it look?").count() == 0
    add_picture(page)
    ask(page, "what?")
    page.get_by_role("button", name="Where did it look?").click()
    page.wait_for_selector(".look canvas")
    size = lambda: page.evaluate(
        "(({ width, height }) => [width, height])(document.querySelector('.look canvas'))"
    )
    assert size() == [6, 6] and "Blanking there costs" in page.locator(".look").inner_text()
    shown = "document.querySelector('.look canvas').toDataURL()"
    blanking = page.evaluate(shown)
    page.get_by_label("Token 1").click()
    assert page.evaluate(shown) != blanking
    page.get_by_role("button", name="Attention").click()
    assert size() == [32, 21] and "of the attention" in page.locator(".look").inner_text()
    image, canvas = (page.locator(f".look {name}").bounding_box() for name in ("img", "canvas"))
    assert image == canvas
    page.get_by_role("button", name="whole answer").click()
    assert page.get_by_role("button", name="Attention").get_attribute("aria-pressed") == "true"


def test_what_an_answer_holds_is_shown_as_text(page):
    """Markdown is made of nodes: nothing of an answer is HTML, and no picture of it loads."""
    text = "<img src=x onerror=alert(1)> ![a](http://example.com/a.png) **b** `c`\n\n- d\n- e"
    reply = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {json.dumps(reply)}\n\n"
        ),
    )
    ask(page, "html?")
    body = page.locator(".turn.assistant .body")
    assert body.locator("img").count() == 0 and "<img src=x" in body.inner_text()
    assert body.locator("strong").inner_text() == "b" and body.locator("li").count() == 2


def test_errors_of_the_server_are_shown(page):
    limit(page, 4)
    ask(page, "x" * 200)
    assert "the context holds" in page.locator(".turn.assistant .fault").inner_text()


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}], indirect=True)
def test_dark(page):
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("document.getElementById('settings').open = true")
    page.select_option("#theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("#side").is_visible()
    page.get_by_label("Open menu").click()
    assert page.locator("#side").is_visible()
    page.get_by_label("Close menu").click()
    limit(page, 3)
    ask(page, "small?")
    assert len(answers(page)) == 1


def test_the_keyboard_reaches_everything(page):
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
    assert {"new", "text", "add", "send", "export", "import"} <= reached
