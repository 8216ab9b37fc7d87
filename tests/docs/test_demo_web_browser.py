"""The demo service in a real browser: a rotation that is watched, and a page that can be used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from webapp_screenshot import NO_BROWSER, PICTURE, browser, find_browser, service, set_view

pytestmark = [
    pytest.mark.slow,
    # The gate installs a browser, so that there this skip cannot hide that nothing was tested.
    pytest.mark.skipif(
        find_browser() is None and os.environ.get("CI") != "true",
        reason=NO_BROWSER,
    ),
]

SECRET = "PLAINTEXT-MARKER"
WAIT = 60  # seconds until a test is given up; how long a page takes is not tested

# The ratio of WCAG 2, for each element that has text of its own, over the first background behind
# it that is not transparent. Disabled controls are exempt there.
CONTRAST = """
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = numbers(color).slice(0, 3).map((part) => {
    const x = part / 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = getComputedStyle(each).backgroundColor;
    if (numbers(color)[3] !== 0) return color;
  }
  return "rgb(255, 255, 255)";
};
const faint = [];
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
  if (!text.length || element.disabled || element.closest("noscript, option")) continue;
  const pair = [light(getComputedStyle(element).color), light(behind(element))];
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (ratio < 4.5) faint.push(`${element.tagName} ${text[0].data.trim()} ${ratio.toFixed(2)}`);
}
return faint;
"""

NAMELESS = """
return [...document.querySelectorAll("button, input, select, textarea, progress")]
  .filter((element) => !(element.labels?.length || element.ariaLabel || element.innerText.trim()))
  .map((element) => element.outerHTML);
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a service of its own, whose rotation takes some 8 seconds at the least."""
    with service("--rows", "2000", "--max-rate", "250") as url:
        yield url


@pytest.fixture
def page(driver: Chrome, url: str) -> Iterator[Chrome]:
    """The first page. What the browser complains of fails the test."""
    set_view(driver, 1000, 800, dark=False)
    driver.get(url)
    complaints(driver)  # forget what an earlier page left
    yield driver
    assert complaints(driver) == []


def complaints(page: Chrome) -> list[str]:
    """What the browser's console says since it was last asked."""
    return [entry["message"] for entry in page.get_log("browser")]  # type: ignore[no-untyped-call]


def by_id(page: Chrome, id_: str) -> WebElement:
    return page.find_element(By.ID, id_)


def submit(page: Chrome, button: WebElement) -> None:
    """Press the button of a form and wait for the page that answers."""
    page.execute_script("window.isThePageBefore = true")
    button.click()
    wait(page, lambda _: not page.execute_script("return window.isThePageBefore === true"))
    wait(page, lambda _: page.execute_script("return document.readyState === 'complete'"))


def wait(page: Chrome, until: Callable[[Chrome], Any]) -> Any:
    return WebDriverWait(page, WAIT, poll_frequency=0.05).until(until)


def rotated(page: Chrome) -> int:
    """The position of the progress bar; 0 before there is one, and -1 after it went."""
    return int(
        page.execute_script(
            "return document.querySelector('progress')?.value"
            " ?? (document.getElementById('rotation').dataset.running === 'true' ? 0 : -1)"
        )
    )


def create(page: Chrome, name: str) -> None:
    form = page.find_element(By.CSS_SELECTOR, "form[action='/integrations']")
    Select(form.find_element(By.NAME, "tenant")).select_by_value("juniper")
    form.find_element(By.NAME, "name").send_keys(name)
    form.find_element(By.NAME, "credentials").send_keys(json.dumps({"apiKey": SECRET}))
    submit(page, form.find_element(By.TAG_NAME, "button"))


def test_a_rotation_is_watched_while_somebody_types(page: Chrome, url: str) -> None:
    create(page, "Made before")
    page.get(url)
    assert page.find_elements(By.ID, "retire-v1") == []  # it is the primary
    assert not by_id(page, "rotate").is_enabled()  # there is nothing to rotate
    submit(page, by_id(page, "add-key"))
    assert by_id(page, "state-v2").text == "registered"
    submit(page, by_id(page, "promote-v2"))
    assert by_id(page, "state-v1").text == "draining"
    submit(page, by_id(page, "retire-v1"))
    assert "'v1' is still needed: 2001 in integrations.credentials" in by_id(page, "refusal").text
    expect_status(page, 409)

    page.get(url)
    submit(page, by_id(page, "rotate"))
    page.execute_script("window.isTheSamePage = true")
    name = page.find_element(By.CSS_SELECTOR, "input[name='name']")
    name.send_keys("typed meanwhile")
    seen = set()
    while (position := rotated(page)) != -1:
        seen.add(position)
    assert len(seen) >= 3, "the progress bar did not move"
    assert page.execute_script("return window.isTheSamePage"), "the page was loaded again"
    assert name.get_attribute("value") == "typed meanwhile"
    assert page.switch_to.active_element == name
    assert by_id(page, "state").text.startswith("Done: 2,009 values re-encrypted under v2, 0 left")
    assert page.find_elements(By.ID, "integrations-v1") == []
    assert by_id(page, "integrations-v2").text == "2,001"
    assert by_id(page, "lucent_secrets-v2").text == "8"
    badges = page.find_elements(By.CSS_SELECTOR, ".list .badge")
    assert {badge.text for badge in badges} == {"v2"}
    assert not by_id(page, "rotate").is_enabled()

    submit(page, by_id(page, "retire-v1"))
    assert page.find_elements(By.ID, "retire-v1") == []
    assert by_id(page, "state-v1").text == "retired"


def expect_status(page: Chrome, status: int) -> None:
    """Take the browser's complaint about an answer that is meant to be an error."""
    messages = complaints(page)
    assert len(messages) == 1
    assert f"status of {status}" in messages[0]


def test_a_secret_is_in_the_page_only_when_it_is_revealed(page: Chrome, url: str) -> None:
    create(page, "Payroll")
    assert by_text(page, "h1") == ["Payroll"]
    assert SECRET not in page.page_source
    submit(page, page.find_element(By.CSS_SELECTOR, "form[action$='/reveal'] button"))
    assert json.loads(by_id(page, "revealed").text) == {"apiKey": SECRET}
    submit(page, page.find_element(By.LINK_TEXT, "Hide"))
    assert SECRET not in page.page_source
    page.get(url)
    assert "Payroll" in page.page_source
    assert SECRET not in page.page_source
    submit(page, page.find_element(By.CSS_SELECTOR, ".list form[action$='/delete'] button"))
    assert "Payroll" not in page.page_source


def by_text(page: Chrome, tag: str) -> list[str]:
    return [element.text for element in page.find_elements(By.TAG_NAME, tag)]


def test_a_form_on_another_site_changes_nothing(page: Chrome, url: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.html"
    elsewhere.write_text(f"<form method=post action={url}/keys><button>A prize</button></form>")
    page.get(elsewhere.as_uri())
    submit(page, page.find_element(By.TAG_NAME, "button"))
    assert by_text(page, "h1") == ["That did not work"]
    assert "another site" in page.page_source
    expect_status(page, 403)
    page.get(url)
    assert page.find_elements(By.ID, "state-v2") == []


def test_nothing_comes_from_elsewhere(page: Chrome, url: str) -> None:
    loaded = page.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert len(loaded) >= 2
    assert [name for name in loaded if not name.startswith(url)] == []


def test_it_can_be_read_and_fits_on_a_phone_and_in_the_dark(page: Chrome, url: str) -> None:
    create(page, "A name as long as they come, and no place to break: " + "n" * 28)
    detail = page.current_url
    submit(page, page.find_element(By.CSS_SELECTOR, "form[action$='/reveal'] button"))
    assert page.execute_script(CONTRAST) == []
    for view in (url, detail):
        page.get(view)
        for width in (320, 375, 1000):
            for dark in (False, True):
                set_view(page, width, 800, dark=dark)
                assert page.execute_script("return document.documentElement.scrollWidth") <= width
                assert page.execute_script(CONTRAST) == []
                assert page.execute_script(NAMELESS) == []
                assert is_dark(page) == dark


def is_dark(page: Chrome) -> bool:
    color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) < 200


def test_the_picture_of_the_documentation_is_small() -> None:
    assert PICTURE.stat().st_size < 100_000
    with Image.open(PICTURE) as picture:
        assert picture.size[0] == 1000
