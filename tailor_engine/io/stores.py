"""Where a run keeps its steps: what the pipeline asks of a store, and one that forgets."""

from __future__ import annotations

from typing import Any, Protocol

from tailor_engine.model import Model


class Store(Protocol):
    """Where a run keeps its steps: `Memory` here, a folder in `runs`."""

    def find(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record of a finished step with these very inputs."""

    def begin(self, name: str, inputs: dict[str, Any]) -> None:
        """Start a step, or go on with it."""

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """Return the checkpoint of an interrupted step with the same inputs."""

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Keep a checkpoint of the running step."""

    def finish(self, name: str, record: dict[str, Any], models: dict[str, Model]) -> dict[str, Any]:
        """Keep a finished step with its models ("model", "teacher"); return the whole record."""

    def load(self, name: str, part: str = "model") -> Model:
        """Return the model that a step wrote."""

    def find_evaluation(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the metrics of a step's model, if measured with these very inputs."""

    def keep_evaluation(self, name: str, inputs: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Keep the metrics of a step's model."""

    def report(self, report: dict[str, Any]) -> None:
        """Keep the report as far as the run has come."""


class Memory:
    """A store that forgets: models stay in memory and nothing is resumed."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Model] = {}

    def find(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Find nothing."""
        return None

    def begin(self, name: str, inputs: dict[str, Any]) -> None:
        """Do nothing."""

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """Return no checkpoint."""
        return None

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Keep nothing."""

    def finish(self, name: str, record: dict[str, Any], models: dict[str, Model]) -> dict[str, Any]:
        """Keep the models, and of earlier steps only the teacher's."""
        keep = record.get("teacher")
        if models:
            self.models = {key: value for key, value in self.models.items() if key[0] == keep}
        self.models.update({(name, part): model for part, model in models.items()})
        return record

    def load(self, name: str, part: str = "model") -> Model:
        """Return a kept model."""
        return self.models[name, part]

    def find_evaluation(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Find nothing."""
        return None

    def keep_evaluation(self, name: str, inputs: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Keep nothing."""

    def report(self, report: dict[str, Any]) -> None:
        """Keep nothing."""
