"""Scores that people bring: what is asked of a model happens elsewhere."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelkin.errors import EvaluationError
from modelkin.records import Evaluation, Subject, content_id


class ToldSettings(BaseModel):
    """Scores are told, with `modelkin tell`.

    Attributes:
        tasks: what each model is scored on, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluator: Literal["told"]
    tasks: Annotated[list[str], Field(min_length=1)]

    @property
    def cache(self) -> None:
        """No evaluations are kept."""
        return None


class Told:
    """Stands for the people who bring scores; scores nothing itself."""

    def __init__(self, settings: ToldSettings) -> None:
        self._protocol = content_id({"evaluator": "told", "tasks": settings.tasks})

    @property
    def protocol(self) -> str:
        """Fingerprint of the names of the tasks: more is not known."""
        return self._protocol

    def evaluate(self, subject: Subject) -> Evaluation:
        """Always an error: there is nobody to ask."""
        raise EvaluationError(
            f"{subject.name}: expected an evaluator that scores models, found 'told'; "
            "modelkin tell records scores"
        )
