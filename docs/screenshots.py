"""Pictures of a report for the README, at the width of a desk and of a phone.

    python docs/screenshots.py demo-run/kinship/report.html

Writes report-desktop.png and report-phone.png beside this file. Needs Chromium, chromedriver and
selenium, as the browser tests do.
"""

import argparse
import base64
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browsing import chromium, missing, open_page, resize  # noqa: E402

# Width and height in CSS pixels, and how many of the picture's go on one of them.
SHOTS = {"report-desktop.png": (1280, 1560, 1), "report-phone.png": (390, 1560, 1.5)}
MOST_BYTES = 400_000


def shoot(driver: Any, width: int, height: int, scale: float) -> bytes:
    """The top of the open page, whatever the window's height."""
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    return base64.b64decode(shot["data"])


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    report = parser.parse_args().report.resolve()
    if missing():
        sys.exit(missing())
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as driver:
        for name, (width, height, scale) in SHOTS.items():
            resize(driver, width, 900)
            open_page(driver, report.as_uri())
            picture = shoot(driver, width, height, scale)
            if len(picture) > MOST_BYTES:
                sys.exit(f"{name}: expected at most {MOST_BYTES:,} bytes, found {len(picture):,}")
            (HERE / name).write_bytes(picture)
            print(f"{HERE / name}: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
