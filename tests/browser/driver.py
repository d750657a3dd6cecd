"""A headless Chromium (Debian's, by its own driver) that looks at pages: in sizes and colour schemes, with what it
complains of, and with axe-core, which finds what people with other senses cannot use."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from typing import Any

SIZES = {"phone": (390, 844), "laptop": (1280, 800), "wide": (1920, 1080)}
SCHEMES = ("light", "dark")
_AXE = Path(__file__).parent / "axe" / "axe.min.js"
_PROGRAMS = ("chromium", "chromedriver")
# For each chart how many colours its canvas has beside the one that it has most of: none is drawn on a blank one.
_COLOURS = """
return [...document.querySelectorAll("figure[data-chart]")].map(figure => {
  const canvas = figure.querySelector("canvas");
  const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return [figure.dataset.chart, new Set(pixels).size - 1];
});
"""
_REACHABLE = """
return [...document.querySelectorAll("a[href], button, select, input, summary, [tabindex='0']")]
  .filter(one => one.checkVisibility()).length;
"""
_MEETS = "window.met = new Set(); document.addEventListener('focusin', event => met.add(event.target));"
_WIDTHS = "const all = document.documentElement; return [all.scrollWidth, all.clientWidth]"


def missing() -> str | None:
    """Why there is no browser, in a sentence; None where there is one."""
    lacking = [name for name in _PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{' and '.join(lacking)} not found; on Debian: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed; the extra test brings it"
    return None


class Browser:
    """One browser, one page at a time."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        # Root may not use the sandbox, and containers have little shared memory.
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
        self.driver.set_script_timeout(60)

    def open(self, where: Path | str, size: str = "laptop", scheme: str = "light") -> None:
        """Show a file, or an address, in a window of one of :data:`SIZES`."""
        wide, high = SIZES[size]
        self._command(
            "Emulation.setDeviceMetricsOverride", width=wide, height=high, deviceScaleFactor=1, mobile=size == "phone"
        )
        self._command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.complaints()
        self.driver.get(where.resolve().as_uri() if isinstance(where, Path) else where)

    def complaints(self) -> list[str]:
        """What the console has said since the last look: errors and warnings of scripts, of the policy, of the page."""
        return [f"{one['level']}: {one['message']}" for one in self.driver.get_log("browser")]

    def evaluate(self, script: str, *arguments: Any) -> Any:
        """What a script returns; the page's policy does not stop it."""
        return self.driver.execute_script(script, *arguments)

    def colours(self) -> dict[str, int]:
        """How many colours each chart has beside that of its ground, by its name, in the order of the page."""
        return dict(self.evaluate(_COLOURS))

    def fits(self) -> bool:
        """Whether nothing of the page stands out at the side."""
        wide, shown = self.evaluate(_WIDTHS)
        return bool(wide <= shown)

    def is_dark(self) -> bool:
        ground = self.evaluate("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", ground)[:3])) < 200

    def walk(self) -> tuple[int, int]:
        """Go through the page by Tab: how many elements there are to reach, and how many were reached."""
        wanted = self.evaluate(_REACHABLE)
        self.evaluate(_MEETS)
        self.press(*["Tab"] * (wanted + 2))
        return wanted, self.evaluate("return met.size")

    def press(self, *keys: str, shift: bool = False) -> None:
        """Type keys by their names: ``Tab``, ``ArrowRight``, ``+``."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        known = {"Tab": Keys.TAB, "ArrowRight": Keys.ARROW_RIGHT, "ArrowLeft": Keys.ARROW_LEFT, "Home": Keys.HOME}
        known |= {"Escape": Keys.ESCAPE, "Enter": Keys.ENTER, " ": Keys.SPACE}
        chain = ActionChains(self.driver, duration=0)
        if shift:
            chain.key_down(Keys.SHIFT)
        for key in keys:
            chain.send_keys(known.get(key, key))
        if shift:
            chain.key_up(Keys.SHIFT)
        chain.perform()

    def point(self, selector: str, across: float, down: float = 0.5, drag_to: float | None = None) -> None:
        """Move the mouse to a place in an element, as shares of its size; hold it down on the way to ``drag_to``."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.evaluate("arguments[0].scrollIntoView({block: 'center'})", element)
        wide, high = element.size["width"], element.size["height"]
        chain = ActionChains(self.driver, duration=0)
        place = int((across - 0.5) * wide), int((down - 0.5) * high)
        chain.move_to_element_with_offset(element, *place)
        if drag_to is not None:
            chain.click_and_hold().move_by_offset(int((drag_to - across) * wide / 2), 0)
            chain.move_by_offset(int((drag_to - across) * wide / 2), 0).release()
        chain.perform()

    def axe(self) -> list[str]:
        """What axe-core finds, a line each with the first element that it means. All its rules are asked."""
        self.evaluate(_AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0];"
            "axe.run().then(result => done(result.violations), error => done([String(error)]));"
        )
        return [
            f"{one['id']}: {one['help']} ({len(one['nodes'])} times, first {one['nodes'][0]['html'][:200]}: "
            f"{one['nodes'][0].get('failureSummary', '')})"
            if isinstance(one, dict)
            else one
            for one in found
        ]

    def picture(self, path: Path, high: int | None = None) -> None:
        """Save the page from its top as PNG: ``high`` pixels of it, or all."""
        size = self._command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": high or size["height"], "scale": 1}
        shot = self._command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self._command("Page.printToPDF", printBackground=False)["data"])

    def close(self) -> None:
        self.driver.quit()

    def _command(self, name: str, **given: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, given)
