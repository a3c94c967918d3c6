"""A headless Chromium, driven over the WebDriver protocol with urllib only."""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import pytest

FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-dev-shm-usage",
  "--hide-scrollbars",
  # A page opened from disk must work without a network: no host resolves.
  "--host-resolver-rules=MAP * ~NOTFOUND",
]
KEYS = {
  "Tab": "\ue004",
  "Enter": "\ue007",
  "Escape": "\ue00c",
  "ArrowLeft": "\ue012",
  "ArrowUp": "\ue013",
  "ArrowRight": "\ue014",
  "ArrowDown": "\ue015",
}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def require():
  """Skips a test where the browser is not installed."""
  missing = [p for p in ("chromium", "chromedriver") if not shutil.which(p)]
  if missing:
    names = " and ".join(missing)
    pytest.skip(f"{names} not found; CI installs chromium and chromium-driver.")


class Browser:
  """One session; use as a context manager."""

  def __init__(self, dark=False):
    self.dark = dark

  def __enter__(self):
    require()
    self.stack = contextlib.ExitStack()
    profile = self.stack.enter_context(
      tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    )
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    driver = subprocess.Popen(
      ["chromedriver", f"--port={port}"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    self.stack.callback(driver.wait)
    self.stack.callback(driver.terminate)
    self.base = f"http://127.0.0.1:{port}"
    self._wait_for_driver()
    options = {
      "binary": shutil.which("chromium"),
      "args": [*FLAGS, f"--user-data-dir={profile}"],
    }
    capabilities = {
      "browserName": "chrome",
      "goog:chromeOptions": options,
      "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    session = self._call(
      "POST", "/session", {"capabilities": {"alwaysMatch": capabilities}}
    )
    self.base += f"/session/{session['sessionId']}"
    self.stack.callback(lambda: self._call("DELETE", ""))
    self.resize()
    self.prefer(self.dark)
    return self

  def __exit__(self, *error):
    self.stack.close()

  def _wait_for_driver(self):
    for _ in range(200):
      try:
        self._call("GET", "/status")
        return
      except urllib.error.URLError:
        time.sleep(0.05)
    raise RuntimeError("chromedriver did not start.")

  def _call(self, method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
      self.base + path,
      data=data,
      method=method,
      headers={"Content-Type": "application/json"},
    )
    try:
      with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
      with error:
        value = json.load(error)["value"]
      message = f"{value['error']}: {value['message'].splitlines()[0]}"
      raise RuntimeError(message) from None

  def devtools(self, command, **parameters):
    body = {"cmd": command, "params": parameters}
    return self._call("POST", "/goog/cdp/execute", body)

  def resize(self, width=1280, height=900):
    self.devtools(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )

  def prefer(self, dark):
    theme = "dark" if dark else "light"
    feature = {"name": "prefers-color-scheme", "value": theme}
    self.devtools("Emulation.setEmulatedMedia", features=[feature])

  def load(self, path):
    """Opens a page from disk."""
    self._call("POST", "/url", {"url": path.as_uri()})

  def open(self, path):
    """Opens an explorer from disk and waits for its first page."""
    self.load(path)
    self.wait("document.querySelector('main')?.dataset.ready")

  def script(self, source, *arguments):
    body = {"script": source, "args": list(arguments)}
    return self._call("POST", "/execute/sync", body)

  def value(self, expression, *arguments):
    return self.script(f"return ({expression})", *arguments)

  def wait(self, source, seconds=20):
    """Waits until the expression is true; returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      value = self.value(source)
      if value:
        return value
      time.sleep(0.03)
    raise AssertionError(f"Still false after {seconds} s: {source}")

  def go(self, page):
    """Opens a page of the explorer by its hash and waits for it."""
    self.script("location.hash = arguments[0]", page)
    self.wait(f"document.querySelector('main').dataset.ready === '{page}'")

  def click(self, selector):
    body = {"using": "css selector", "value": selector}
    element = self._call("POST", "/element", body)[ELEMENT]
    self._call("POST", f"/element/{element}/click", {})

  def text(self, selector):
    return self.value(
      "document.querySelector(arguments[0]).innerText", selector
    )

  def all(self, selector, what):
    """Returns an expression of `n` for every element n that matches."""
    every = "[...document.querySelectorAll(arguments[0])]"
    return self.value(f"{every}.map((n) => {what})", selector)

  def texts(self, selector):
    return self.all(selector, "n.innerText")

  def images(self, selector):
    """Returns the indices of the images that the links lead to."""
    return self.all(selector, "+n.hash.split('/')[2]")

  def wait_for_heading(self, text):
    self.wait(f"document.querySelector('h1').textContent === '{text}'")

  def wait_for_tip(self):
    self.wait("!document.getElementById('tip').hidden")

  def show(self, bin_selector):
    """Scrolls to a bin and waits for its thumbnails."""
    bin_of = f'document.querySelector("{bin_selector}")'
    self.script(f"{bin_of}.scrollIntoView({{block: 'center'}})")
    self.wait(f"{bin_of}.querySelector('.thumb')")

  def move(self, selector, x=0.5, y=0.5, click=False):
    """Moves the mouse to a fraction of an element's visible box."""
    box = self.script(
      "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
      "return [b.left, b.top, b.width, b.height]",
      selector,
    )
    place = {"x": round(box[0] + x * box[2]), "y": round(box[1] + y * box[3])}
    actions = [{"type": "pointerMove", "duration": 0, **place}]
    if click:
      actions += [
        {"type": name, "button": 0} for name in ("pointerDown", "pointerUp")
      ]
    mouse = {"type": "pointer", "id": "mouse", "actions": actions}
    self._call("POST", "/actions", {"actions": [mouse]})

  def press(self, *keys):
    """Presses keys one after another."""
    actions = [
      {"type": name, "value": KEYS.get(key, key)}
      for key in keys
      for name in ("keyDown", "keyUp")
    ]
    keyboard = {"type": "key", "id": "keyboard", "actions": actions}
    self._call("POST", "/actions", {"actions": [keyboard]})

  def log(self):
    """Returns errors and warnings on the console since the last call."""
    return [
      line["message"]
      for line in self._call("POST", "/se/log", {"type": "browser"})
      if line["level"] in ("SEVERE", "WARNING")
    ]

  def requests(self):
    """Returns the addresses requested since the last call."""
    lines = self._call("POST", "/se/log", {"type": "performance"})
    messages = [json.loads(line["message"])["message"] for line in lines]
    return [
      m["params"]["request"]["url"]
      for m in messages
      if m["method"] == "Network.requestWillBeSent"
    ]
