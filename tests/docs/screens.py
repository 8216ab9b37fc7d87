"""Look at the documentation on a phone: what is wider than its screen, and pictures to look at.

``python -m tests.docs.screens HTML TARGET`` writes a picture of each page, in light and in dark,
from the built pages in HTML. It needs Chromium and its driver (on Debian ``chromium`` and
``chromium-driver``), and says so where they are missing.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

WIDTH: Final = 360
HEIGHT: Final = 844

# What is wider than the screen, and does not scroll by itself. A phone's `innerWidth` grows with
# what is on the page, so the width is given.
_EXCESS: Final = """
const width = arguments[0];
const scrolls = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const overflow = getComputedStyle(e).overflowX;
    if (overflow === "auto" || overflow === "scroll" || overflow === "hidden") return true;
  }
  return false;
};
return [...document.querySelectorAll("article *")]
  .filter((e) => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
  .map((e) => `${e.tagName} ${e.className} ${Math.round(e.getBoundingClientRect().right)}`)
  .concat(document.documentElement.scrollWidth > width ? ["the page itself"] : []);
"""


def missing() -> str | None:
    """Say what is missing to open a page, or ``None``."""
    for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian's package {package}): no page was looked at"
    return None


class Phone:
    """A browser as wide as a phone."""

    def __init__(self, driver: Chrome) -> None:
        self._driver = driver

    def excess(self, page: Path) -> list[str]:
        """Return the elements of `page` that leave the screen to the right."""
        self._driver.get(page.as_uri())
        found: list[str] = self._driver.execute_script(_EXCESS, WIDTH)
        return found

    def picture(self, page: Path, target: Path, *, height: int = HEIGHT) -> None:
        """Write a picture of the top of `page`."""
        self._driver.get(page.as_uri())
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _metrics(height))
        self._driver.save_screenshot(str(target))
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _metrics(HEIGHT))


def _metrics(height: int) -> dict[str, object]:
    return {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": True}


@contextmanager
def phone(*, dark: bool) -> Iterator[Phone]:
    """Open a browser that prefers light or dark pages."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=ChromeService(str(shutil.which("chromedriver"))))
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", _metrics(HEIGHT))
        yield Phone(driver)
    finally:
        driver.quit()


def main(html: Path, target: Path) -> None:
    """Write the pictures."""
    if (reason := missing()) is not None:
        sys.exit(reason)
    target.mkdir(parents=True, exist_ok=True)
    for dark in (False, True):
        with phone(dark=dark) as browser:
            for page in sorted(html.glob("*.html")):
                name = f"{page.stem}-{'dark' if dark else 'light'}.png"
                browser.picture(page.resolve(), target / name, height=4 * HEIGHT)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.docs.screens HTML TARGET")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
