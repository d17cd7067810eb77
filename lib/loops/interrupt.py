"""SIGINT and SIGTERM as a request the training loop answers between two steps."""

import signal
from types import FrameType


class StopRequest:
    """Context in which the first SIGINT or SIGTERM sets `requested` instead of killing.

    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that came; None: none did."""
        self._previous: dict[int, object] = {}

    def is_requested(self) -> bool:
        return self.requested is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
