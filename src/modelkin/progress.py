"""Progress of long steps, shown by whoever looks. Knows nothing of what the steps do.

Libraries that draw bars of their own are made to report to ours instead.
"""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from rich.progress import Progress, TaskID

OnProgress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do."""


class Bars:
    """The progress bars of a run; all methods do nothing where nobody looks."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress
        self._inner: dict[str, TaskID] = {}

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; call what it yields after each."""
        if self.progress is None or total == 0:
            yield lambda: None
            return
        progress = self.progress
        task = progress.add_task(label, total=total)
        try:
            yield lambda: progress.advance(task)
        finally:
            progress.remove_task(task)

    def inner(self, label: str) -> OnProgress:
        """What to call for a bar that comes and goes within a step."""

        def report(done: int, total: int) -> None:
            if self.progress is None:
                return
            if label not in self._inner:
                self._inner[label] = self.progress.add_task(f"  {label}", total=total)
            self.progress.update(self._inner[label], completed=done, total=total)
            if done >= total:
                self.progress.remove_task(self._inner.pop(label))

        return report


@contextmanager
def tqdm_reports_to(report: OnProgress | None, *modules: ModuleType) -> Iterator[None]:
    """While this lasts, the tqdm bars of `modules` call `report` instead of drawing.

    With no `report` they are silent. Not for use by several threads at once.
    """

    class Bar:
        """Stands in for tqdm; has the methods that the libraries use."""

        def __init__(self, iterable: Any = (), total: int | None = None, **_: Any) -> None:
            self._iterable = iterable
            self._total = total or (len(iterable) if isinstance(iterable, Sized) else 0)
            self._done = 0

        def __iter__(self) -> Iterator[Any]:
            for item in self._iterable:
                yield item
                self.update()

        def update(self, count: int = 1) -> None:
            self._done += count
            if report and self._total:
                report(min(self._done, self._total), self._total)

        def set_description(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            pass

    before = [getattr(module, "tqdm") for module in modules]  # noqa: B009 - mypy knows no tqdm
    for module, tqdm in zip(modules, before, strict=True):
        # Some write `import tqdm`, others `from tqdm import tqdm`.
        bar = SimpleNamespace(tqdm=Bar) if isinstance(tqdm, ModuleType) else Bar
        setattr(module, "tqdm", bar)  # noqa: B010
    try:
        yield
    finally:
        for module, tqdm in zip(modules, before, strict=True):
            setattr(module, "tqdm", tqdm)  # noqa: B010
