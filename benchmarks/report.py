"""How fast the report of a large run is written and opens.

    python benchmarks/report.py                  # 200 models, some seconds
    python benchmarks/report.py --models 500

Makes up a run (12 foundation models, two tasks of 500 items), writes its report, and opens it in
headless Chromium from disk without a network, each time in a browser with an empty profile.
"Opened" is when the first figure, the family tree, stands on the page and it answers; "complete"
when all figures are drawn. Both count from the start of navigation. Prints medians and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from browsing import chromium, missing, open_page, resize
from synthetic import run_of

from modelkin.report import write_report

# Marks set by the page's script, in ms since navigation began.
MARKS = "return performance.getEntriesByType('mark').map((m) => [m.name, m.startTime])"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if missing():
        sys.exit(missing())
    names = [f"organisation__fine-tune-{n}-7b-instruct" for n in range(12)]
    source = run_of(given.models, names=names, k=6, items=500)
    marks: dict[str, list[float]] = {}
    writing = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        for repeat in range(given.repeats):
            start = time.perf_counter()
            write_report(file, [source])
            writing.append(time.perf_counter() - start)
            with chromium(Path(folder) / str(repeat)) as driver:
                resize(driver, 1280, 900)
                open_page(driver, file.as_uri())
                for name, when in driver.execute_script(MARKS):
                    marks.setdefault(name, []).append(when / 1000)
        size = file.stat().st_size
    found = {
        "models": len(source.state.members),
        "megabytes": round(size / 1e6, 2),
        "seconds to write": round(statistics.median(writing), 2),
        **{
            f"seconds until {name}": round(statistics.median(times), 2)
            for name, times in marks.items()
        },
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
