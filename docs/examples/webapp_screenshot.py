"""Make ``docs/_static/demo-web.png``: the demo service in the middle of a rotation.

Run it from the repository with ``python docs/examples/webapp_screenshot.py``. It needs Chromium,
ChromeDriver and the dependency group ``test``. For another size and dark colours, to look at:
``--width 375 --dark --to /tmp/phone.png``.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import element_to_be_clickable, staleness_of
from selenium.webdriver.support.wait import WebDriverWait

EXAMPLES = Path(__file__).parent
PICTURE = EXAMPLES.parent / "_static" / "demo-web.png"
HEIGHT = 800

# Wait until the rotation is well under way and the visible rows have both key versions.
WORTH_A_PICTURE = """
const badges = [...document.querySelectorAll("[id^=version-]")].slice(0, 4);
return document.querySelector("progress")?.position > 0.3
  && new Set(badges.map((badge) => badge.innerText)).size === 2;
"""

NO_BROWSER = "needs Chromium and ChromeDriver (Debian: apt-get install chromium chromium-driver)"


@contextmanager
def service(*options: str) -> Iterator[str]:
    """Run the service in its own process on a free port, and yield its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "webapp", "--port", "0", *options],
        cwd=EXAMPLES,
        # Import the package of this checkout, whatever is installed.
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            # The socket listens before this line is printed, so a request waits for the start.
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


def find_browser() -> tuple[str, str] | None:
    """Return the paths of Chromium and its driver, if both are installed."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


@contextmanager
def browser(
    width: int = 1000, height: int = HEIGHT, *, dark: bool = False
) -> Iterator[webdriver.Chrome]:
    """Start a headless Chromium with a page of `width` times `height` CSS pixels."""
    found = find_browser()
    if found is None:
        raise RuntimeError(NO_BROWSER)
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        for argument in (
            "--headless=new",
            "--no-sandbox",  # Chromium refuses its sandbox to root; the page is our own
            "--disable-dev-shm-usage",
            "--disable-gpu",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, Service(found[1]))
        try:
            set_view(driver, width, height, dark=dark)
            yield driver
        finally:
            driver.quit()


def set_view(driver: webdriver.Chrome, width: int, height: int, *, dark: bool) -> None:
    """Set the size of the page, and the colour scheme that the user prefers."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def picture(width: int, *, dark: bool) -> bytes:
    """Return a PNG of the first page in the middle of a rotation."""
    with (
        service("--rows", "10000", "--max-rate", "1000") as url,
        browser(width, dark=dark) as driver,
    ):
        driver.get(url)
        wait = WebDriverWait(driver, 120)
        for button in ("add-key", "promote-v2", "rotate"):
            element = wait.until(element_to_be_clickable((By.ID, button)))
            element.click()
            wait.until(staleness_of(element))
        wait.until(lambda _: driver.execute_script(WORTH_A_PICTURE))
        return driver.get_screenshot_as_png()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=PICTURE)
    parser.add_argument("--width", type=int, default=1000, help="CSS pixels")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    if find_browser() is None:
        sys.exit(NO_BROWSER)
    taken = Image.open(io.BytesIO(picture(options.width, dark=options.dark)))
    # The page has few colours, so a palette cuts the size to a third without a visible change.
    taken.convert("RGB").quantize(64).save(options.to, optimize=True)
    print(f"{options.to}: {options.to.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
