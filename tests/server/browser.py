"""A headless Chromium, driven over its DevTools protocol: no library beyond aiohttp is needed."""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars"),
]
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), " ": (32, " ")}
SHIFT = 8


@contextlib.contextmanager
def running_chromium(folder: Path) -> Iterator[str]:
    """Yields the address of the browser's socket.

    Raises:
      OSError: it does not start here.
    """
    command = [str(CHROMIUM), *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    listens_at = folder / "DevToolsActivePort"  # written once it does: the port, and the path of the socket
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while not (listens_at.exists() and "\n/" in listens_at.read_text()):
                if process.poll() is not None or time.monotonic() > end:
                    raise OSError(f"{CHROMIUM} does not start; its exit code is {process.poll()}.")
                time.sleep(0.05)
            port, path = listens_at.read_text().split()
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.terminate()


class Page:
    """A tab with cookies and storage of its own.

    Attributes:
      requests: addresses that were asked for.
      problems: what the console says is wrong. Answers with an error status are not counted: Chromium logs them all.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._replies: dict[int, asyncio.Future] = {}
        self._session: str | None = None

    async def send(self, method: str, **params) -> dict:
        number = next(self._ids)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        session = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": number, "method": method, "params": params, **session})
        return await asyncio.wait_for(reply, 30)

    async def read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                reply = self._replies.pop(data["id"])
                if "error" in data:
                    reply.set_exception(RuntimeError(data["error"]["message"]))
                else:
                    reply.set_result(data["result"])
                continue
            params = data["params"]
            match data["method"]:
                case "Network.requestWillBeSent":
                    self.requests.append(params["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.problems.append(json.dumps(params["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    self.problems.append(json.dumps(params["args"]))
                case "Log.entryAdded" if params["entry"]["source"] != "network":
                    self.problems.append(params["entry"]["text"])

    async def attach(self) -> None:
        context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.send(f"{domain}.enable")

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def js(self, expression: str):
        """The value of an expression, as JSON; promises are awaited."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = await self.send("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, timeout: float = 30.0) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + timeout
        while not await self.js(f"!!({expression})"):
            assert time.monotonic() < end, f"not within {timeout} s: {expression}\n{await self.text()}\n{self.problems}"
            await asyncio.sleep(0.02)

    async def text(self, selector: str = "body") -> str:
        """What a reader sees of an element."""
        return await self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    async def write(self, text: str) -> None:
        """Into the field that has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, shift: bool = False) -> None:
        code, text = KEYS[key]
        fields = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        modifiers = SHIFT if shift else 0
        await self.send("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=modifiers, **fields)
        await self.send("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **fields)

    async def tab_to(self, condition: str) -> None:
        """Moves the focus with the Tab key until `condition` holds of the focused element `e`."""
        for _ in range(40):
            if await self.js(f"(e => !!({condition}))(document.activeElement)"):
                return
            await self.press("Tab")
        raise AssertionError(f"Tab never reaches {condition}")

    async def click(self, selector: str) -> None:
        await self.until(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        await self.js(f"document.querySelector({json.dumps(selector)}).click()")

    async def resize(self, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        await self.send("Emulation.setDeviceMetricsOverride", **size)

    async def set_scheme(self, scheme: str) -> None:
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self, path: str | Path, **options) -> None:
        data = (await self.send("Page.captureScreenshot", **options))["data"]
        Path(path).write_bytes(base64.b64decode(data))


@contextlib.asynccontextmanager
async def open_page(address: str, url: str) -> AsyncIterator[Page]:
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        page = Page(socket)
        reader = asyncio.ensure_future(page.read())
        try:
            await page.attach()
            await page.open(url)
            yield page
        finally:
            reader.cancel()
