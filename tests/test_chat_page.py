"""The page in a real browser, of a phone's size: headless Chromium, driven by selenium."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import pytest
from tiny import TINY, random_weights, train_sentencepiece

from lit_gpt import Config
from lit_gpt.chat import ChatModel
from lit_gpt.pretrained import Pretrained, write_lit
from lit_gpt.retrieval import Documents

pytestmark = pytest.mark.long
webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("gradio")
ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("app", ROOT / "chat_gradio" / "app.py")
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)
NASTY = "<img src=x onerror=document.title='owned'> <b>bold</b> **stars** ![i](http://c.example/p.png) cats"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    train_sentencepiece(folder / "model" / "tokenizer.model")
    config = Config(name="tiny", **{**TINY, "block_size": 512})
    write_lit(Pretrained(folder, config, random_weights(config)), folder / "model")
    (folder / "docs").mkdir()
    (folder / "docs" / "cats.md").write_text("Cats sleep.\n")
    return folder


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    phone = {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2.0}}
    options.add_experimental_option("mobileEmulation", phone)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.implicitly_wait(60)
    yield driver
    driver.quit()


class Slow:
    """A model whose words come slowly enough to be seen coming."""

    def __init__(self, chat: ChatModel, words: str) -> None:
        self.chat, self.words = chat, words

    def __getattr__(self, name: str):
        return getattr(self.chat, name)

    def ask(self, messages, sampling, documents=None):
        reply = self.chat.ask(messages, sampling, documents)
        self.messages = messages

        class Words:
            sources = reply.sources

            def __iter__(_):
                for word in self.words.split(" "):
                    time.sleep(0.2)
                    yield word + " "

        return Words()


@pytest.fixture(scope="module")
def page(folder):
    chat = Slow(ChatModel.open(folder / "model"), f"I say: {NASTY}")
    blocks = app.build(chat, Documents(folder / "docs"), system="Be kind")
    address = app.launch(blocks, "127.0.0.1", None, wait=False)
    yield chat, address
    blocks.close()


def element(browser, selector: str):
    return browser.find_element("css selector", selector)


def shown(browser) -> str:
    return element(browser, "#conversation").text


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.1)


def test_a_conversation_on_a_phone(page, browser):
    chat, address = page
    browser.get(address)
    element(browser, "#question textarea").send_keys(NASTY)
    element(browser, "#send").click()

    states = set()
    wait_for(lambda: states.add(shown(browser)) or "[1] cats.md:1" in shown(browser))
    said = [s.split("I say:")[1] for s in states if "I say:" in s]
    assert len(set(said)) > 3, "the reply does not come word by word"

    # What was typed and what was said are there as they are, and nothing of it was interpreted or fetched.
    assert shown(browser).count(NASTY) == 2
    assert browser.title.endswith("chat") and not browser.find_elements("css selector", "#conversation img")
    urls = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(message["params"]["request"]["url"])
    assert all(url.startswith((address, "data:", "blob:")) for url in urls), urls
    assert not any(url.endswith("/x") for url in urls)

    # It fits the phone.
    width, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window == 390

    # The next question knows the conversation, without the sources; Enter sends it, New forgets it.
    element(browser, "#question textarea").send_keys("and dogs?\n")
    wait_for(lambda: shown(browser).count("I say:") == 2 and shown(browser).endswith(NASTY))
    roles = [(m["role"], m["content"]) for m in chat.messages]
    assert roles[0] == ("system", "Be kind") and roles[1] == ("user", NASTY) and roles[3] == ("user", "and dogs?")
    assert roles[2][0] == "assistant" and "[1]" not in roles[2][1]
    element(browser, "#new").click()
    wait_for(lambda: "I say:" not in shown(browser))
    element(browser, "#question textarea").send_keys("again\n")
    wait_for(lambda: shown(browser).endswith(NASTY))
    assert [m["content"] for m in chat.messages] == ["Be kind", "again"]


def test_what_cannot_be_sent_stays_in_the_box(page, browser):
    chat, address = page
    browser.get(address)
    browser.execute_script(
        "const box = arguments[0]; box.value = 'word '.repeat(3000); box.dispatchEvent(new Event('input'))",
        element(browser, "#question textarea"),
    )
    element(browser, "#send").click()
    wait_for(lambda: "context" in element(browser, "body").text)
    assert element(browser, "#question textarea").get_attribute("value").startswith("word word")


def test_files_are_neither_taken_nor_given(page):
    import http.client

    _, address = page
    host = address.removeprefix("http://").rstrip("/")
    for path in ("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file=../../etc/passwd"):
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("GET", path)
        assert connection.getresponse().status in (403, 404)
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="../x.txt"\r\n\r\nhello\r\n--b--\r\n'
    connection = http.client.HTTPConnection(host, timeout=30)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    connection.request("POST", "/gradio_api/upload", body, headers)
    assert connection.getresponse().status >= 400
