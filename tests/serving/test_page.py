"""The page in a real browser: ask, watch the bank, read the text; nobody without the key."""

import os
from pathlib import Path

import pytest
import requests
from browser import chromium
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from servers import FORKED, serving

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MEMORY = ["--layers", "1,3", "--segment-size", "64", "--bank-size", "40", "--alpha", "0.5"]
MEMORY += ["--experts", '{"num_experts": 16, "top_k": 4}']
ENGINE = ["--dtype", "float32", "--max-model-len", "8192", "--block-size", "16"]
ENGINE += ["--kv-cache-memory-bytes", str(128 << 20), "--served-model-name", "tiny"]
FILLER = "The old farmer carries the basket to the market. The young baker opens the window. "
HIDDEN = f"{FILLER * 4}The magic number of Rome is 47. {FILLER * 4}The magic number of Rome is"
PAGE = "/plugins/pacellm/"
# A picture of the page is written there, for the README.
PICTURE = os.environ.get("PACELLM_PICTURE")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [*FORKED, "serve", str(TINY), *MEMORY, *ENGINE, "--api-key", KEY]
    with serving(command, log) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(server, browser):
    """The page, freshly loaded; at the end nothing may have been logged as an error."""
    browser.get_log("browser")
    browser.get(server.replace("http://", f"http://anyone:{KEY}@") + PAGE)
    find(browser, "key").send_keys(KEY)
    yield browser
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def find(browser, name):
    return browser.find_element(By.ID, name)


def wait(browser, condition):
    return WebDriverWait(browser, 120).until(condition)


def type_prompt(browser, text):
    """As by pasting; typing long texts takes a browser minutes."""
    browser.execute_script("arguments[0].value = arguments[1]", find(browser, "prompt"), text)


def ask(browser, text, tokens=16):
    type_prompt(browser, text)
    find(browser, "tokens").clear()
    find(browser, "tokens").send_keys(str(tokens))
    find(browser, "send").click()
    wait(browser, lambda _: find(browser, "send").is_enabled() and kinds(browser))
    request = find(browser, "request").get_attribute("value")
    wait(browser, lambda _: len(kinds(browser)) == len(report(browser, request)["kinds"]))
    return request


def kinds(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#text > span')].map(s => s.dataset.kind).join('')"
    )


def report(browser, request, layer="1"):
    return whole_report(browser, request)["layers"][layer]


def whole_report(browser, request, **asked):
    url = browser.current_url.partition(PAGE)[0].replace(f"anyone:{KEY}@", "")
    answer = requests.get(
        f"{url}{PAGE}answers/{request}", params=asked, headers=HEADERS, timeout=60
    )
    answer.raise_for_status()
    return answer.json()


def complete(server, text, tokens, **settings):
    body = {"model": "tiny", "prompt": text, "max_tokens": tokens, "temperature": 0}
    answer = requests.post(
        f"{server}/v1/completions",
        json={**body, "vllm_xargs": settings},
        headers=HEADERS,
        timeout=120,
    )
    return answer.json()["choices"][0]["text"]


def test_ask_with_and_without_and_see_the_bank(page, server):
    request = ask(page, HIDDEN)
    # What a client would be told.
    assert find(page, "with").text.strip() == complete(server, HIDDEN, 16).strip()
    off = complete(server, HIDDEN, 16, pacellm_enabled=False)
    assert find(page, "without").text.strip() == off.strip()

    mine = report(page, request)
    assert kinds(page) == mine["kinds"]
    said = page.execute_script("return document.querySelector('#text').textContent")
    assert said.startswith(HIDDEN)
    rows = page.execute_script(
        "return [...document.querySelectorAll('#bank tbody tr')].map("
        "r => [...r.cells].map(c => c.textContent.trim()))"
    )
    slots = mine["slots"]
    assert {row[0]: (row[1], row[2]) for row in rows} == {
        str(i): (str(slot["usage"]), str(slot["merges"])) for i, slot in enumerate(slots)
    }
    usages = [int(row[1]) for row in rows]
    assert usages == sorted(usages, reverse=True)
    by_slot = {int(row[0]): row[3] for row in rows}
    near = {int(row[0]): row[4] for row in rows}
    for i, slot in enumerate(slots):
        assert by_slot[i].endswith(f" at {slot['source']}")
        assert near[i] == f"slot {slot['nearest']} ({slot['likeness']:.2f})"
    assert page.find_elements(By.CSS_SELECTOR, "#rates rect")
    recalls = page.find_elements(By.CSS_SELECTOR, "#recalls li")
    assert len(recalls) > 0
    assert "recalled" in recalls[0].text

    # A token tells what it recalled.
    position = next(i for i, kind in enumerate(mine["kinds"]) if kind in "hm")
    page.execute_script("document.querySelectorAll('#text > span')[arguments[0]].click()", position)
    assert f"slot {mine['slot'][position]}," in find(page, "token").text

    # The other layer has a bank of its own.
    Select(find(page, "layer")).select_by_value("3")
    assert kinds(page) == report(page, request, "3")["kinds"]
    if PICTURE:
        Select(find(page, "layer")).select_by_value("1")
        page.save_screenshot(PICTURE)


def test_experts_by_token(page):
    assert not find(page, "routing").is_displayed()
    request = ask(page, FILLER + HIDDEN)
    assert "experts" not in whole_report(page, request)
    found = whole_report(page, request, experts=2)["experts"]
    assert found["layers"] == [0, 1, 2, 3]
    # 16 bits a token.
    digits = [found["chosen"][i : i + 4] for i in range(0, len(found["chosen"]), 4)]
    assert len(digits) == len(kinds(page))
    computed = [[i for i in range(16) if int(four, 16) >> 15 - i & 1] for four in digits]
    assert [len(one) for one in computed] == [0 if kind == "c" else 4 for kind in kinds(page)]

    assert find(page, "experts").accessible_name == "Experts of layer"
    assert find(page, "expert").accessible_name == "Mark tokens of expert"
    Select(find(page, "experts")).select_by_value("2")
    rows = "return [...document.querySelectorAll('#shares tbody tr')].map(r => r.innerText)"
    told = [row.split() for row in wait(page, lambda _: page.execute_script(rows))]
    assert find(page, "shares").accessible_name == "Experts, busiest first"
    totals = {str(i): sum(i in one for one in computed) for i in range(16)}
    assert {row[0]: int(row[1]) for row in told} == totals
    assert [int(row[1]) for row in told] == sorted(totals.values(), reverse=True)

    busiest = int(told[0][0])
    Select(find(page, "expert")).select_by_value(str(busiest))
    marked = page.execute_script(
        "return [...document.querySelectorAll('#text > span')].map("
        "s => s.classList.contains('computed'))"
    )
    assert marked == [busiest in one for one in computed]
    page.execute_script("[...document.querySelectorAll('#text > span')].at(-1).click()")
    experts = ", ".join(map(str, computed[-1]))
    assert find(page, "token").text.endswith(f"; experts {experts} of layer 2.")
    if PICTURE:
        page.save_screenshot(PICTURE.replace(".png", "-experts.png"))
    Select(find(page, "experts")).select_by_value("")
    wait(page, lambda _: not find(page, "shares").is_displayed())
    assert not page.find_elements(By.CSS_SELECTOR, "#text .computed")


def test_the_bank_changes_while_a_request_runs(page):
    type_prompt(page, HIDDEN)
    find(page, "tokens").clear()
    find(page, "tokens").send_keys("1200")
    find(page, "send").click()
    seen = wait(page, lambda _: len(kinds(page)))
    status = find(page, "status").text
    wait(page, lambda _: len(kinds(page)) > seen and find(page, "status").text != status)
    assert not find(page, "send").is_enabled()
    wait(page, lambda _: find(page, "send").is_enabled())


def test_eight_thousand_tokens(page):
    request = ask(page, FILLER * 400, 8)
    mine = report(page, request)
    assert len(mine["kinds"]) > 7500
    assert kinds(page) == mine["kinds"]
    # What the prefix cache had is in the first bar.
    ended = [commit["position"] for commit in mine["commits"]]
    bars = len(ended) + (len(mine["kinds"]) > ended[-1])
    assert bars > 100
    assert len(page.find_elements(By.CSS_SELECTOR, "#rates rect")) == 4 * bars


def test_a_finished_request_of_somebody_else_is_shown_by_its_id(page, server):
    body = {"model": "tiny", "prompt": FILLER * 20, "max_tokens": 4, "temperature": 0}
    body["vllm_xargs"] = {"pacellm_report": True}
    answer = requests.post(f"{server}/v1/completions", json=body, headers=HEADERS, timeout=60)
    name = answer.json()["id"]
    find(page, "request").clear()
    find(page, "request").send_keys(name + Keys.ENTER)
    wait(page, lambda _: kinds(page))
    assert kinds(page) == report(page, name)["kinds"]


def test_it_is_usable_by_keyboard_and_screen_reader(page):
    for element in page.find_elements(By.CSS_SELECTOR, "input, textarea, select, button, output"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    regions = page.find_elements(By.CSS_SELECTOR, "[role=region], [role=img], table")
    assert all(region.accessible_name for region in regions if region.is_displayed())
    find(page, "prompt").send_keys("The old farmer" + Keys.TAB + Keys.TAB + Keys.TAB + Keys.ENTER)
    wait(page, lambda _: find(page, "with").text and find(page, "send").is_enabled())


def test_a_refusal_is_shown(server, browser):
    browser.get(server.replace("http://", f"http://anyone:{KEY}@") + PAGE)
    find(browser, "key").send_keys("wrong")
    type_prompt(browser, "Hi")
    find(browser, "send").click()
    wait(browser, lambda _: "401" in find(browser, "with").text)
    browser.get_log("browser")


def test_nothing_is_served_without_the_key(server):
    for path in ("", "page.js", "page.css", "memory", "answers/x"):
        answer = requests.get(f"{server}{PAGE}{path}", timeout=30)
        assert answer.status_code == 401, path
        wrong = requests.get(f"{server}{PAGE}{path}", auth=("anyone", "wrong"), timeout=30)
        assert wrong.status_code == 401, path
    assert requests.post(f"{server}{PAGE}words", json={"ids": [1]}, timeout=30).status_code == 401
    answer = requests.get(f"{server}{PAGE}", auth=("anyone", KEY), timeout=30)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for bad in ([-1], [10**30], ["x"], [1] * 70000):
        answer = requests.post(
            f"{server}{PAGE}words", json={"ids": bad}, headers=HEADERS, timeout=30
        )
        assert 400 <= answer.status_code < 500, bad[:1]
    other = requests.get(f"{server}{PAGE}other.js", headers=HEADERS, timeout=30)
    assert other.status_code == 404


def test_the_page_names_no_other_host():
    files = Path(__file__).parent.parent.parent / "pacellm_vllm" / "serving" / "viewer"
    for file in files.iterdir():
        assert "//" not in file.read_text().replace("http://www.w3.org/2000/svg", "").replace(
            "// ", ""
        ), file
