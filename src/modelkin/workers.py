"""Where work is done. Knows nothing about models: a task is a function, a job its argument."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers(Protocol):
    """Carries out jobs."""

    def perform(
        self, task: Callable[[Job], Result], jobs: Iterable[Job]
    ) -> Iterator[tuple[Job, Result]]:
        """Yield each job with `task(job)`, in the order in which they are finished.

        Every job is carried out exactly once; an exception of a task is raised to the caller.
        """
        ...


class InProcess:
    """One job after the other, in this process."""

    def perform(
        self, task: Callable[[Job], Result], jobs: Iterable[Job]
    ) -> Iterator[tuple[Job, Result]]:
        """Yield each job with its result, in order."""
        for job in jobs:
            yield job, task(job)
