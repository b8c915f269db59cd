"""The journal of an audit: a file with the result of each student, from which an interrupted audit goes on."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState

from ..attribution import Journal
from ..ranks import from_all_ranks


class AuditJournal(Journal):
    """
    A [`~trl_dpg.attribution.Journal`] of an audit.

    Attributes:
        done (`dict[str, Any]`): The results so far by their names, as values that JSON can hold.
    """

    layout = "trl-dpg audit 1"
    work, results = "audit", "results"

    @staticmethod
    def entry(record: dict[str, Any]) -> tuple[Any, Any]:
        return record["name"], record["result"]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result with a name. If it is not there, it is computed and written."""
        if name not in self.done:
            record = {"name": name, "result": compute()}
            main = PartialState().is_main_process
            from_all_ranks(lambda: self.append(record) if main else None, "Writing the journal")
            self.done[name] = record["result"]
        return self.done[name]
