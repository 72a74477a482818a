"""The chat page as people use it, in headless Chromium.

Needs Playwright for Python and a Chromium: Playwright's own, or the system's. Without them all of
this is skipped. The check of accessibility needs axe-core as axe-playwright-python carries it.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.server.conftest import CALL, THOUGHT, on_a_socket, recording

from gemsmith.engine.batching import EngineConfig

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python")
expect = playwright.expect
expect.set_options(timeout=30_000)

AXE = find_spec("axe_playwright_python")
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
LONG = "ab " * 400
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
PLACES = '```json\n[{"box_2d": [250, 500, 750, 900], "label": "cup"}, {"point": [10, 20]}]\n```'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        found = own if Path(own).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip("no Chromium is installed")
        running = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser) -> Iterator[Any]:
    """An empty tab; nothing may go wrong in it that a test does not expect."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    context.set_default_timeout(30_000)
    opened, problems = context.new_page(), []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda said: said.type == "error" and problems.append(said.text))
    opened.on(
        "request", lambda request: problems.append(request.url) if _far(request.url) else None
    )
    yield opened
    context.close()
    assert [text for text in problems if "Failed to load resource" not in text] == []


def _far(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:"))


@pytest.fixture
def visit(page, says) -> Iterator[Callable[..., Any]]:
    """visit(script) opens the page of a server whose model says that."""
    servers = []

    def opened(script: Any, **options: Any) -> Any:
        servers.append(on_a_socket(says(script), **options))
        url, _ = servers[-1].__enter__()
        page.goto(url)
        if not options.get("keys"):
            expect(page.locator("#model")).to_have_text("gemma")
        return page

    yield opened
    for server in servers:
        page.goto("about:blank")
        server.__exit__(None, None, None)


def ask(page: Any, text: str) -> Any:
    """Send a message with Enter; the last reply."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    return page.locator(".reply").last


def over(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()


def picture(width: int = 64, height: int = 32) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


def test_a_reply_streams_and_says_what_it_cost(visit):
    page = visit(f"{THOUGHT}It **rains**.")
    reply = ask(page, "Weather?")
    over(page)
    expect(reply.locator(".content strong")).to_have_text("rains")
    thoughts = reply.locator(".thoughts")
    expect(thoughts).to_be_hidden()  # folded
    reply.locator("summary").click()
    expect(thoughts).to_have_text("rain?")
    facts = reply.locator("footer span").first
    expect(facts).to_have_text(
        re.compile(r"[\d.]+ tokens/s · first token after [\d.]+ s · prompt \d+ · reply \d+ \(thin")
    )
    ask(page, "And then?")
    over(page)
    expect(page.locator(".reply footer span").last).to_contain_text("cached")
    expect(page.locator("#memory")).to_have_text(
        re.compile(
            r"memory: weights [\d.]+ MiB · K/V [\d.]+ MiB of [\d.]+ MiB · process [\d.]+ .iB"
        )
    )
    expect(page.locator("#announcer")).to_have_text("It **rains**.")


def test_enter_sends_shift_enter_does_not_escape_stops(visit):
    page = visit(LONG)
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".user p")).to_have_text("one\ntwo", use_inner_text=True)
    reply = page.locator(".reply")
    expect(reply.locator(".content")).to_contain_text("ab ab")
    page.keyboard.press("Escape")
    over(page)
    expect(reply.locator("footer")).to_contain_text("stopped")
    assert len(reply.locator(".content").inner_text()) < len(LONG) - 2
    expect(page.locator("#input")).to_be_focused()


def test_retry_edit_copy_and_a_new_chat(visit):
    said = iter(["first", "second", "third"])
    page = visit(lambda _: next(said))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reply = ask(page, "Hm?")
    expect(reply.locator(".content")).to_have_text("first")
    over(page)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".reply .content")).to_have_text("second")
    over(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "second"
    page.get_by_role("button", name="Edit").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#input")).to_have_value("Hm?")
    page.keyboard.press("Enter")
    expect(page.locator(".reply .content")).to_have_text("third")
    over(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#input")).to_be_focused()


def test_calls_are_shown_and_their_results_go_on_with_the_loop(visit):
    page = visit(lambda prompt: "It is warm." if "24 degrees" in prompt else CALL)
    page.get_by_role("button", name="Settings").click()
    page.fill("#tools", json.dumps(TOOL))  # a bare function will do
    page.get_by_role("button", name="Close").click()
    reply = ask(page, "Weather?")
    over(page)
    expect(reply.locator(".call code")).to_have_text("weather")
    expect(reply.locator(".call pre")).to_have_text('{\n  "city": "Rome",\n  "days": 2\n}')
    expect(page.locator("#announcer")).to_contain_text("The model calls weather.")
    expect(reply.locator("footer")).to_contain_text("call after")
    ask(page, "Well?")
    expect(page.locator("#notice")).to_contain_text("waits for the results")
    page.fill("#input", "")
    box = page.get_by_label("Result of weather")
    box.fill("24 degrees")
    box.press("Enter")
    expect(page.locator(".reply").last.locator(".content")).to_have_text("It is warm.")
    expect(page.locator(".call pre").last).to_have_text("24 degrees")


def test_what_could_not_be_read_as_a_call_is_shown(visit):
    page = visit("<|tool_call>call:weather{city<tool_call|>")
    page.get_by_role("button", name="Settings").click()
    page.fill("#tools", json.dumps([TOOL]))
    reply = ask(page, "Weather?")
    over(page)
    expect(reply.locator(".tool-problem p")).to_contain_text("A call that cannot be made")
    expect(reply.locator(".tool-problem pre")).to_contain_text("call:weather{city")


def test_the_controls_reach_the_request(visit):
    page = visit("Hm.")
    page.get_by_role("button", name="Settings").click()
    for label, value in (
        ("System prompt", "Be brief."),
        ("Max tokens", "7"),
        ("Temperature", "0.5"),
        ("Tools", json.dumps([TOOL])),
    ):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Thinking", exact=True).select_option("on")
    page.get_by_label("Thinking budget").fill("5")
    page.get_by_label("Image budget").select_option("560")
    page.get_by_label("Tool calls").select_option("none")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hello!")
    assert sent.value.post_data_json == {
        "model": "gemma",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello!"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "none",
        "max_tokens": 7,
        "temperature": 0.5,
        "thinking_budget": 5,
        "mm_budget": 560,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    over(page)
    page.reload()
    expect(page.locator("#system")).to_have_value("Be brief.")


def test_a_wrong_setting_is_said_before_anything_is_sent(visit):
    said = iter(["first", "second"])
    page = visit(lambda _: next(said))
    page.get_by_role("button", name="Settings").click()
    page.fill("#tools", "[{")
    expect(page.locator("#tools-problem")).to_contain_text("This is not JSON")
    ask(page, "Hello!")
    expect(page.locator("#tools")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
    page.fill("#tools", '[{"parameters": {}}]')
    expect(page.locator("#tools-problem")).to_have_text("Every tool needs a name.")
    page.get_by_role("button", name="Insert an example").click()
    expect(page.locator("#tools-problem")).to_be_empty()
    page.fill("#temperature", "3")
    page.press("#input", "Enter")
    expect(page.locator("#temperature")).to_be_focused()
    page.fill("#temperature", "")
    page.press("#input", "Enter")
    over(page)
    page.fill("#temperature", "3")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#temperature")).to_be_focused()
    expect(page.locator(".reply .content")).to_have_text("first")  # it is still there


def test_an_error_is_said_and_can_be_tried_again(visit):
    said = iter(["FAIL", "Better."])
    page = visit(lambda _: next(said))
    reply = ask(page, "Hello!")
    expect(reply.get_by_role("alert")).to_contain_text("the server failed on this request")
    over(page)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".reply .content")).to_have_text("Better.")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    expect(ask(page, "Hm?").get_by_role("alert")).to_have_text("The server cannot be reached.")


def test_a_key_is_asked_for_and_kept_for_the_tab(visit):
    page = visit("Hello.", keys=("a-secret-key",))
    expect(page.locator("#notice")).to_contain_text("asks for an API key")
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("wrong-secret-key")
    field.press("Tab")
    expect(page.locator("#model")).to_be_empty()
    field.fill("a-secret-key")
    field.press("Tab")
    expect(page.locator("#model")).to_have_text("gemma")
    page.reload()
    expect(page.locator("#model")).to_have_text("gemma")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


HOSTILE = """<img src=x onerror="document.title='owned'"> <script>document.title='owned'</script>

[a](javascript:document.title='owned') [b](data:text/html,x) ![c](https://example.org/pixel.png)
[d](https://example.org/) &lt;i&gt; `<b>`

<iframe src="https://example.org"></iframe>
"""


def test_what_a_model_writes_is_text_and_nothing_else(visit):
    page = visit(HOSTILE)
    reply = ask(page, "Hm?")
    over(page)
    content = reply.locator(".content")
    expect(content).to_contain_text("<img src=x onerror=")
    expect(content).to_contain_text('<iframe src="https://example.org"></iframe>')
    expect(content).to_contain_text("<i> <b>")
    assert content.locator("img, script, iframe, i, b").count() == 0
    links = content.locator("a").evaluate_all("found => found.map(a => a.href)")
    assert links == ["https://example.org/pixel.png", "https://example.org/"]
    assert "owned" not in page.title()


def test_a_model_without_eyes_and_ears_says_so(visit):
    page = visit("Hm.")
    attach = page.get_by_role("button", name="Attach")
    expect(attach).to_be_disabled()
    expect(attach).to_have_accessible_description("gemma reads text alone")
    page.evaluate(DROP, ["a.png", "image/png"])
    expect(page.locator("#notice")).to_have_text("This model takes no pictures: a.png")


DROP = """([name, type]) => {
  const dropped = new DataTransfer();
  dropped.items.add(new File(["x"], name, { type }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, cancelable: true }));
}"""
PASTE = """([name, type]) => {
  const pasted = new DataTransfer();
  pasted.items.add(new File(["x"], name, { type }));
  const event = new ClipboardEvent("paste", { clipboardData: pasted, cancelable: true });
  document.getElementById("input").dispatchEvent(event);
}"""


def test_pictures_and_sounds_are_attached_and_places_drawn(page, sensing):
    sensing.script, sensing.asked = lambda _: PLACES, []
    config = EngineConfig(max_num_seqs=1, max_model_len=1500)
    with on_a_socket(sensing, config) as (url, _):
        page.goto(url)
        expect(page.get_by_role("button", name="Attach")).to_be_enabled()
        page.evaluate(DROP, ["notes.txt", "text/plain"])
        expect(page.locator("#notice")).to_have_text("notes.txt is no picture, sound or video.")
        page.evaluate(DROP, ["dropped.png", "image/png"])
        page.evaluate(PASTE, ["pasted.png", "image/png"])
        expect(page.locator("#tray li")).to_have_count(2)
        page.get_by_role("button", name="Remove dropped.png").click()
        page.get_by_role("button", name="Remove pasted.png").click()
        page.evaluate(DROP, ["film.mp4", "video/mp4"])
        assert not page.locator("#tray video").evaluate("video => video.controls")
        page.get_by_role("button", name="Remove film.mp4").click()
        page.set_input_files("#files", [
            {"name": "table.png", "mimeType": "image/png", "buffer": picture()},
            {"name": "voice.wav", "mimeType": "audio/wav", "buffer": recording(0.5)},
        ])  # fmt: skip
        expect(page.locator("#tray li")).to_have_count(2)
        with page.expect_request("**/v1/chat/completions") as sent:
            reply = ask(page, "Where is the cup?")
        image, sound, text = sent.value.post_data_json["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        assert sound["audio_url"]["url"].startswith("data:audio/wav;base64,")
        assert text == {"type": "text", "text": "Where is the cup?"}
        over(page)
        expect(reply.locator("footer")).to_contain_text(re.compile(r"image \d+, audio \d+"))
        expect(page.locator("#tray li")).to_have_count(0)
        shown = reply.locator("figure img").bounding_box()
        box = reply.locator("figure .box").bounding_box()
        assert box["x"] == pytest.approx(shown["x"] + shown["width"] * 0.5, abs=1)
        assert box["y"] == pytest.approx(shown["y"] + shown["height"] * 0.25, abs=1)
        assert box["width"] == pytest.approx(shown["width"] * 0.4, abs=1)
        assert box["height"] == pytest.approx(shown["height"] * 0.5, abs=1)
        expect(reply.locator("figure .box")).to_have_text("cup")
        expect(reply.locator("figure .point")).to_have_count(1)
        caption = reply.locator("figure figcaption")
        expect(caption).to_have_text("2 places in table.png")
        # An answer names no picture: of several in a message the last is taken, and that is said.
        files = [
            {"name": f"{name}.png", "mimeType": "image/png", "buffer": picture()} for name in "ab"
        ]
        page.set_input_files("#files", files)
        expect(page.locator("#tray li")).to_have_count(2)
        for text in ("And here?", "Sure?"):
            reply = ask(page, text)
            over(page)
            caption = reply.locator("figure figcaption")
            expect(caption).to_have_text("2 places in b.png, the last of 2 pictures")
        page.goto("about:blank")


@pytest.mark.parametrize("width", [320, 1280])
def test_a_large_picture_leaves_the_end_of_the_conversation_in_sight(page, sensing, width):
    """While it is attached, too; and once it is sent its turn is as wide as it is."""
    sensing.script, sensing.asked = lambda _: "a\n\n" * 40, []
    with on_a_socket(sensing, EngineConfig(max_num_seqs=1, max_model_len=2000)) as (url, _):
        page.set_viewport_size({"width": width, "height": 600})
        page.goto(url)
        expect(page.get_by_role("button", name="Attach")).to_be_enabled()
        reply = ask(page, "Hm?")
        over(page)
        expect(reply.locator("footer")).to_be_in_viewport(ratio=1)
        large = {"name": "a.png", "mimeType": "image/png", "buffer": picture(900, 700)}
        page.set_input_files("#files", [large])
        expect(page.locator("#tray li")).to_have_count(1)
        expect(reply.locator("footer")).to_be_in_viewport(ratio=1)
        ask(page, "And?")
        over(page)
        turn = page.locator(".user").last
        padding = 2 * 0.9 * 16
        shown = turn.locator("img").bounding_box()
        assert turn.bounding_box()["width"] == pytest.approx(shown["width"] + padding, abs=1)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.goto("about:blank")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_accessible(visit, width, scheme):
    page = visit(
        lambda prompt: CALL if "Weather" in prompt else f"{THOUGHT}# A\n\n{PLACES}\n\n|a|\n|-|\n|b|"
    )
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    _accessible(page)
    ask(page, "Hm?")
    over(page)
    page.locator("summary").click()
    ask(page, "Weather?")
    over(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    _accessible(page)
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.get_by_role("button", name="Close")).to_be_focused()
    _accessible(page)
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def _accessible(page: Any) -> None:
    if AXE is None or AXE.origin is None:
        return
    # Not as an element: the page's policy lets no other script in.
    page.evaluate((Path(AXE.origin).parent / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []


def test_the_keyboard_stays_in_settings_that_cover_the_page(visit):
    """What they cover cannot be seen, so it is not to have the focus."""
    page = visit("Hm.")
    page.set_viewport_size({"width": 390, "height": 700})
    page.get_by_role("button", name="Settings").click()
    for _ in range(14):  # more than there are fields
        assert page.evaluate("document.activeElement.matches('body, #settings *')")
        page.keyboard.press("Shift+Tab")
    page.get_by_role("button", name="Close").click()
    page.locator("#new-chat").click()
    expect(page.locator("#input")).to_be_focused()
    page.get_by_role("button", name="Settings").click()
    page.set_viewport_size({"width": 1280, "height": 700})
    page.locator("#input").focus()
    expect(page.locator("#input")).to_be_focused()


def test_the_keyboard_gets_everywhere_in_order(visit):
    page = visit("Hm.")
    expect(page.locator("#input")).to_be_focused()  # once the page knows its model
    order = []
    for _ in range(5):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Shift+Tab")
    assert order == ["input", "log", "settings-toggle", "new-chat", "skip"]
    page.locator(".skip").press("Enter")
    page.keyboard.type("here")
    expect(page.locator("#input")).to_have_value("here")
