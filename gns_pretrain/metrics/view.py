"""What a view of the run record is, and the wrapper that keeps a failing one from the training."""

from collections.abc import Callable
from typing import Any, Protocol


class View(Protocol):
    """Shows records somewhere."""

    def write(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl; an undefined number is None."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Show what the finished run came to."""

    def close(self) -> None:
        """Let go of files and processes; also after finish()."""


class MayFail:
    """A view that cannot stop training: its first failure is said in one line, and ends it.

    Args:
        name: What the line calls it.
        open_view: Makes the view; may fail as well.
        say: Prints a line.
    """

    def __init__(
        self, name: str, open_view: Callable[[], View], say: Callable[[str], None]
    ) -> None:
        self._name = name
        self._say = say
        self._view: View | None = None
        self._attempt(lambda: setattr(self, "_view", open_view()))

    def write(self, record: dict[str, Any]) -> None:
        """Show one line, if the view still stands."""
        if (view := self._view) is not None:
            self._attempt(lambda: view.write(record))

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the summary, if the view still stands."""
        if (view := self._view) is not None:
            self._attempt(lambda: view.finish(summary))

    def close(self) -> None:
        """Close the view, if it still stands."""
        if (view := self._view) is not None:
            self._attempt(view.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._view = None
            cause = (str(error).splitlines() or [""])[0]
            way_out = "; pip install 'gns-pretrain[tracking]'" * isinstance(error, ImportError)
            self._say(
                f"{self._name} failed and is left out from here on, metrics.jsonl has everything "
                f"({type(error).__name__}: {cause}{way_out})"
            )
