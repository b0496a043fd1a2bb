"""The chat page, in a real browser against a server whose model says what the test wants."""

import asyncio
import contextlib
import itertools
import re

import pytest

from qjax.server.page import PAGE_ROUTES
from tests.server.browser import CHROMIUM, open_page, running_chromium

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

THOUGHT = "<think>\nLet me think about it.\nI know this.\n</think>\n\n"
TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'
CALLS = "".join(
    f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for city in ("Oslo", "Rome")
)
DONE = "document.querySelector('#conversation').ariaBusy === 'false'"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(running_chromium(tmp_path_factory.mktemp("chromium")))
        except OSError as error:
            pytest.skip(str(error))
        yield address


@pytest.fixture
async def visit(start, chromium):
    """Starts a server and opens its page; in the end the page has asked nobody else, and had nothing to complain of."""
    async with contextlib.AsyncExitStack() as stack:
        pages = []

        async def visit_server(**options):
            server = await start(**{"max_model_len": 4096, **options})
            page = await stack.enter_async_context(open_page(chromium, server.url + "/"))
            pages.append((page, server))
            return page, server

        yield visit_server
        for page, server in pages:
            assert page.problems == []
            assert page.requests and all(url.startswith(server.url + "/") for url in page.requests)


async def ask_without_waiting(page, text):
    await page.js("document.querySelector('#message').focus()")
    await page.write(text)
    await page.press("Enter")


async def ask(page, text):
    await ask_without_waiting(page, text)
    await page.until(DONE)


def prompt(server, call=-1):
    return server.engine.tokenizer.decode(server.engine.calls[call][1], skip_special_tokens=False)


# Without a browser


async def test_the_files_are_served_without_a_key_and_the_api_is_not(start):
    server = await start({"api_key": ["secret"], "root_path": "/behind/proxy"})
    types = set()
    for prefix, route in itertools.product(("", "/behind/proxy"), PAGE_ROUTES):
        async with server.session.get(server.url + prefix + route.path) as response:
            text = await response.text()
            assert response.status == 200 and "default-src 'self'" in response.headers["Content-Security-Policy"]
            assert "innerHTML" not in text and not re.search(r"\son\w+=|style=|javascript:|@import", text)
            assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # SVG's namespace
            assert len(text.splitlines()) < 400
            types.add(response.content_type)
    assert types == {"text/html", "text/css", "text/javascript", "image/svg+xml"}
    assert (await server.get("/v1/models"))[0] == 401
    assert (await server.get("/page/../app.py"))[0] == 401


async def test_it_can_be_turned_off(start):
    server = await start({"enable_chat_page": False})
    assert [(await server.get(path))[0] for path in ("/", "/page/app.js")] == [404, 404]
    assert (await server.get("/v1/models"))[0] == 200


# A conversation


@in_browser
async def test_thinking_streams_open_and_folds(visit):
    page, server = await visit(answer=lambda *_: THOUGHT + "It is **Paris**, " + "of course. " * 4, delay=0.02)
    await page.until("document.querySelector('#model').textContent === 'org/fake-model · 4,096 tokens'")
    await ask_without_waiting(page, "What is the capital?")
    await page.until("document.querySelector('details')?.open && document.querySelector('.reasoning').textContent")
    assert (await page.text("summary")).startswith("Thinking…")
    await page.until("document.querySelector('.content strong')")
    assert await page.js("!document.querySelector('details').open && document.querySelector('#send').hidden")
    await page.until("/\\d tokens\\/s/.test(document.querySelector('.stats').textContent)")
    assert await page.js("document.querySelector('#conversation').ariaBusy") == "true"  # it is live
    await page.until(DONE)
    assert re.fullmatch(r"Thought for \d+\.\d s · \d+ tokens", await page.text("summary"))
    assert re.fullmatch(r"\d+ tokens · \d+(\.\d)? tokens/s · first after \d+\.\d s", await page.text(".stats"))
    assert (await page.text(".content")).startswith("It is Paris, of course.")
    await page.click("summary")
    assert await page.text(".reasoning") == "Let me think about it.\nI know this."

    await ask(page, "And of Norway?")
    assert "What is the capital?" in prompt(server) and "It is **Paris**, of course." in prompt(server)
    assert await page.js("document.querySelectorAll('.turn').length") == 4
    await page.click("#new-chat")
    await ask(page, "Hello")
    assert "capital" not in prompt(server)
    assert "Hello" in await page.text("#conversation") and "capital" not in await page.text("#conversation")


@in_browser
async def test_settings_reach_the_engine(visit):
    page, server = await visit()
    await page.click("#open-settings")
    await page.js(
        """for (const [name, value] of Object.entries({system: "Be brief.", thinking: "off", temperature: 0.25,
        top_p: 0.5, top_k: 7, max_tokens: 3})) document.querySelector("#settings form").elements[name].value = value"""
    )
    await page.click("#settings .primary")
    await ask(page, "Hi")
    params = server.engine.calls[-1][2]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.25, 0.5, 7, 3)
    assert "Be brief." in prompt(server) and prompt(server).endswith("<think>\n\n</think>\n\n")
    assert "limit of tokens" in await page.text(".assistant .note")


@in_browser
async def test_tool_calls_and_their_results(visit):
    def answer(prompt, params, index):
        return "It is **warm**." if "<tool_response>" in prompt else THOUGHT + CALLS

    page, server = await visit(answer=answer)
    await page.click("#open-settings")
    await page.js("document.querySelector('#tools').focus()")
    await page.write('[{"type": "function"}]')
    assert "Tool 1 must look like" in await page.text("#tools-error")
    await page.press("Escape")
    await ask_without_waiting(page, "Weather?")
    await page.until("document.querySelector('#settings').open")  # not sent: the dialog says why
    assert server.engine.calls == [] and await page.js("document.querySelector('#message').value") == "Weather?"
    await page.js("document.querySelector('#tools').select()")
    await page.write(TOOLS)
    assert await page.text("#tools-error") == ""
    await page.click("#settings .primary")
    await page.js("document.querySelector('#message').focus()")
    await page.press("Enter")
    await page.until(DONE)

    assert "get_weather" in prompt(server)
    assert await page.js("[...document.querySelectorAll('.call code')].map(e => e.textContent)") == ["get_weather"] * 2
    shown = "[...document.querySelectorAll('.call pre')].map(e => JSON.parse(e.textContent))"
    assert await page.js(shown) == [{"city": "Oslo"}, {"city": "Rome"}]
    await page.until("document.activeElement === document.querySelector('.results textarea')")
    await page.press("Enter")  # the second result is missing
    assert len(server.engine.calls) == 1
    for text in ("7 degrees", "20 degrees"):
        await page.write(text)
        await page.press("Tab")
    await page.press("Enter")  # on the button
    await page.until("document.querySelectorAll('.assistant').length === 2 && " + DONE)
    assert re.search(r"<tool_call>.*Oslo.*Rome.*7 degrees.*20 degrees", prompt(server), re.S)
    assert "Let me think about it." in prompt(server)  # the thinking belongs to the question that is being answered
    assert await page.text(".turn:last-child strong") == "warm"
    assert await page.js("[...document.querySelectorAll('.results textarea')].every(e => e.readOnly)")


@in_browser
async def test_edit_and_regenerate(visit):
    count = iter(range(100))
    page, server = await visit(answer=lambda *_: f"Answer {next(count)}")
    await ask(page, "First")
    await ask(page, "Second")
    await page.click(".turn:last-child .actions button:last-child")
    await page.until("document.querySelector('.turn:last-child').innerText.includes('Answer 2') && " + DONE)
    assert "Answer 0" in prompt(server) and "Answer 1" not in prompt(server)
    visible = "[...document.querySelectorAll('.user button')].filter(e => e.checkVisibility()).length"
    assert await page.js(visible) == 1
    await page.click(".user:nth-last-child(2) button")
    assert await page.js("document.querySelector('#message').value") == "Second"
    assert await page.js("document.querySelectorAll('.turn').length") == 2
    await ask(page, "!")
    assert "Second!" in prompt(server) and "Answer 2" not in prompt(server)


@in_browser
async def test_stop_ends_the_request_on_the_server(visit):
    page, server = await visit(answer=lambda *_: "word " * 2000, delay=0.01)
    for number, stop in enumerate((lambda: page.click("#stop"), lambda: page.press("Escape")), 1):
        await ask_without_waiting(page, "Go on")
        await page.until(f"document.querySelectorAll('.content')[{number - 1}]?.textContent.length > 20")
        assert server.engine.num_running == 1
        await stop()
        await page.until(DONE)
        for _ in range(200):
            if server.engine.num_running == 0:
                break
            await asyncio.sleep(0.01)
        assert server.engine.num_running == 0 and len(server.engine.calls) == number
        assert "finished" not in server.engine.ends.values()
        assert "You stopped the answer." in await page.text(".turn:last-child")
        assert await page.js("document.activeElement === document.querySelector('#message')")


# Failures


@in_browser
async def test_errors_are_shown_and_can_be_tried_again(visit):
    page, server = await visit(max_model_len=64)
    await ask(page, "word " * 100)
    assert "maximum context length is 64 tokens" in await page.text(".error")
    await page.click(".user button")
    await page.js("document.querySelector('#message').value = ''")
    server.engine.error_after = 2  # a request that fails once it has begun
    await ask(page, "Hi")
    assert "Hello" in await page.text(".turn:last-child .content")
    assert "could not compute this request" in await page.text(".turn:last-child .error")
    server.engine.error_after = None
    await page.click(".turn:last-child .retry")
    await page.until("document.querySelector('.content')?.textContent === 'Hello from answer 0.' && " + DONE)
    assert await page.js("document.querySelectorAll('.turn').length") == 2 and await page.text(".error") == ""

    server.stop.ask()
    await server.task
    await ask(page, "Hi")
    assert await page.text(".turn:last-child .error") == "The server does not answer."


@in_browser
async def test_it_says_what_is_being_loaded_and_waits(visit):
    page, server = await visit(wait=False, phases=["loading the weights"])
    await page.until("/loading the weights.*Trying again/.test(document.querySelector('#status').textContent)")
    await ask_without_waiting(page, "Early question")
    await page.until("document.querySelector('.waiting')?.checkVisibility()")
    assert server.engine.calls == []
    server.engine.go_on.set()
    await page.until("document.querySelector('.content')?.textContent === 'Hello from answer 0.' && " + DONE)
    assert await page.text("#status") == "" and "org/fake-model" in await page.text("#model")


@in_browser
async def test_it_asks_for_the_key(visit):
    page, _ = await visit(config={"api_key": ["open sesame"]}, wait=False)
    await page.until("document.querySelector('#key-dialog').open")
    await page.press("Escape")
    await page.until("document.querySelector('#status').textContent === 'The server needs an API key.'")
    await ask_without_waiting(page, "Hi")
    for key, reason in (("wrong", "This server asks for a key."), ("open sesame", "Unauthorized")):
        await page.until(f"document.querySelector('#key-reason').textContent.startsWith({reason!r})")
        await page.until("document.querySelector('#key-dialog').open")
        await page.write(key)
        await page.press("Enter")
    await page.until("document.querySelector('.content')?.textContent === 'Hello from answer 0.' && " + DONE)
    kept = "[Object.values(sessionStorage), localStorage.length, document.cookie, location.search]"
    assert await page.js(kept) == [["open sesame"], 0, "", ""]
    await page.click("#open-settings")
    await page.click("#forget-key")
    assert await page.js("sessionStorage.length") == 0


# How it looks and what it lets in


@in_browser
async def test_no_answer_becomes_markup(visit):
    evil = "<script>window.hacked = 1</script><img src=/x onerror='window.hacked = 1'>"
    text = f"<think>\n{evil}\n</think>\n\n{evil}\n\n- {evil}\n\n```\n{evil}\n```\n**{evil}** [a](javascript:alert(1))"
    call = '<tool_call>\n{"name": "<b>f</b>", "arguments": {"a": "<img src=/y>"}}\n</tool_call>'
    page, server = await visit(answer=lambda *_: text + call)
    await page.js(f"document.querySelector('#tools').value = {TOOLS!r}")
    await ask(page, evil)
    shown = await page.js("document.querySelector('#conversation').textContent")
    assert shown.count(evil) == 6 and "<b>f</b>" in shown and "<img src=/y>" in shown
    tags = "[...document.querySelectorAll('#conversation *')].map(e => e.tagName)"
    assert not {"SCRIPT", "IMG", "A", "B"} & set(await page.js(tags))
    assert await page.js("window.hacked === undefined")
    assert {url.removeprefix(server.url) for url in page.requests} <= {
        *(route.path for route in PAGE_ROUTES),
        *("/v1/models", "/v1/chat/completions"),
    }


@in_browser
async def test_markdown(visit):
    text = (
        "# Title\nOne *word* and `a < b`\nsecond line, 2 * 3 * 4\n\n- first\n- **second**\n  1. inner\n- third\n\n"
        "```python\nif a:\n\n    return\n```\nafter\n\n---\n~~~\nopen"
    )
    page, _ = await visit(answer=lambda *_: text)
    await ask(page, "Hi")
    expected = (
        "H3(Title) P(One EM(word) and CODE(a < b)\nsecond line, 2 * 3 * 4) "
        "UL(LI(first)LI(STRONG(second)OL(LI(inner)))LI(third)) PRE(CODE(if a:\n\n    return)) P(after) HR() "
        "PRE(CODE(open))"
    )
    tree = """(function tree(e) { return [...e.childNodes].map(
        n => n.nodeName === "#text" ? n.data : `${n.nodeName}(${tree(n)})`).join("") })"""
    shown = f"[...document.querySelector('.content').children].map(n => ({tree})({{childNodes: [n]}})).join(' ')"
    assert await page.js(shown) == expected


@in_browser
async def test_nothing_is_wider_than_the_screen(visit):
    long = "x" * 300
    text = f"<think>\n{long}\n</think>\n\n{long} `{long}`\n\n```\n{long}\n```\n- {long}\n"
    page, _ = await visit(answer=lambda *_: text + CALLS, config={"served_model_name": ["org/" + "name-" * 30]})
    await page.js(f"document.querySelector('#tools').value = {TOOLS!r}")
    await ask(page, long)
    await page.click("summary")
    for width in (360, 1200):
        await page.resize(width, 640, mobile=width < 500)
        for dialog in (None, "#settings", "#key-dialog"):
            if dialog:
                await page.js(f"document.querySelector('{dialog}').showModal()")
            wide = f"""[...document.querySelectorAll('body *')].filter(e => !e.closest('pre') && e.checkVisibility()
                && e.getBoundingClientRect().right > {width}).map(e => e.outerHTML.slice(0, 80))"""
            assert await page.js(wide) == []
            assert await page.js("document.documentElement.scrollWidth") == width
            await page.js("document.querySelector('dialog[open]')?.close()")


@in_browser
async def test_by_keyboard_alone(visit):
    page, server = await visit(answer=lambda prompt, *_: THOUGHT + "Yes.")
    await page.until("document.querySelectorAll('#examples button').length === 3")
    assert await page.js("document.activeElement.id") == "message"
    await page.write("one")
    await page.press("Enter", shift=True)
    await page.write("two")
    await page.press("Enter")
    await page.until("document.querySelector('.assistant') && " + DONE)
    assert "one\ntwo" in prompt(server)
    await page.tab_to("e.tagName === 'SUMMARY'")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert await page.js(outline) == "solid"
    await page.press("Enter")
    await page.until("document.querySelector('details').open")
    await page.tab_to("e.textContent === 'Regenerate'")
    await page.press("Enter")
    for _ in range(200):
        if len(server.engine.calls) == 2:
            break
        await asyncio.sleep(0.01)
    await page.until(DONE)
    await page.tab_to("e.id === 'open-settings'")
    await page.press("Enter")
    await page.until("document.querySelector('#settings').open")
    await page.tab_to("e.name === 'temperature'")
    await page.write("0.5")
    await page.press("Enter")
    await page.until("!document.querySelector('#settings').open")
    assert await page.js("document.activeElement.id") == "open-settings"
    await page.tab_to("e.id === 'new-chat'")
    await page.press("Enter")
    await page.tab_to("e.closest('#examples')")
    await page.press("Enter")
    await page.until("document.querySelector('.assistant') && " + DONE)
    assert server.engine.calls[-1][2].temperature == 0.5
    unnamed = """[...document.querySelectorAll('button, input, textarea')].filter(
        e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"""
    assert await page.js(unnamed) == []
