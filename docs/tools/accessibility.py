"""Opens pages of the site, and other files, as people do: on a wide screen and a phone, light and
dark.

Takes a picture of each, and runs axe on it. What axe calls serious or critical is printed, and is
the exit status. It needs a Chromium that is installed; without one it says so and does nothing.

python -m docs.tools.accessibility --pictures FOLDER site [FILE.html ...]
"""

import argparse
import functools
import http.server
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = (
    "",
    "tutorials/linen/",
    "how-to/attention/",
    "how-to/errors/",
    "reference/transformations/",
    "studies/clip/",
    "notebooks/heads/",
)
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
GRAVE = ("serious", "critical")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


def serve(folder: pathlib.Path) -> str:
    """The folder's address, as long as this process lives."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def visit(browser: Browser, address: str) -> Iterator[tuple[str, Page]]:
    """The page on every screen, light and dark."""
    for screen, (width, height) in SCREENS.items():
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                reduced_motion="reduce",
            )
            page = context.new_page()
            answer = page.goto(address, wait_until="load")
            if answer is None or not answer.ok:
                raise SystemExit(f"{address} is not there: make docs")
            page.wait_for_timeout(500)  # colours that fade are on their way
            yield f"{screen}-{scheme}", page
            context.close()


def problems(page: Page) -> list[str]:
    """What axe finds, and what a phone shows: a page that is wider than its screen."""
    found = [
        f"{violation['impact']}: {violation['help']} ({violation['id']}), {node['html'][:160]}"
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in GRAVE
        for node in violation["nodes"]
    ]
    width, screen = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    return found + [f"serious: {width} pixels wide on a screen of {screen}"] * (width > screen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("files", type=pathlib.Path, nargs="*")
    parser.add_argument("--pictures", type=pathlib.Path, required=True)
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        print("Skipped: no Chromium is installed; on Debian: apt install chromium")
        return 0
    options.pictures.mkdir(parents=True, exist_ok=True)
    site = serve(options.site)
    addresses = {page.strip("/").replace("/", "-") or "home": f"{site}/{page}" for page in PAGES}
    for file in options.files:
        addresses[f"{file.parent.name}-{file.stem}"] = f"{serve(file.parent)}/{file.name}"
    failed = False
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, address in addresses.items():
            for look, page in visit(browser, address):
                page.screenshot(path=options.pictures / f"{name}-{look}.png")
                found = problems(page)
                failed |= bool(found)
                print(f"{name} {look}: {len(found) or 'nothing'} serious or critical", flush=True)
                print("".join(f"  {each}\n" for each in dict.fromkeys(found)), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
