"""Following records.jsonl: only what is new, however long the file and whatever happens to it."""

import json
from pathlib import Path

CHUNK_BYTES = 1 << 18
"""Most bytes one poll reads, about a thousand records: a reader beside training stays cheap."""

MARK_BYTES = 256
"""Bytes before the reading place that are remembered to recognise the file by."""


class Tail:
    """Reads the new, complete records of a growing records.jsonl, a bounded piece at a time.

    A resumed run rewrites the file without the steps it will do again, and a fetched copy is a
    new file with the old beginning. So the file counts as the same one while the bytes just before
    our place are the ones we read there; else reading starts over and `poll` says so.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0
        self._mark = b""

    def poll(self) -> tuple[bool, list[dict]]:
        """(whether reading started over, the next records); no records: nothing new so far."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False, []
        with file:
            file.seek(self._offset - len(self._mark))
            restarted = file.read(len(self._mark)) != self._mark
            if restarted:
                self._offset = 0
                file.seek(0)
            data = file.read(CHUNK_BYTES)
            if len(data) == CHUNK_BYTES and b"\n" not in data:
                data += file.readline()  # one record longer than a chunk
        data = data[: data.rfind(b"\n") + 1]  # a torn last line is left for later
        self._offset += len(data)
        self._mark = data[-MARK_BYTES:] or (b"" if restarted else self._mark)
        return restarted, [row for line in data.splitlines() if (row := _row(line))]


def _row(line: bytes) -> dict | None:
    """A line's record, or None for a line that a killed writer left in pieces."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None


def wall_clock_offset(path: Path) -> float:
    """Unix time minus record time, by the last record and when the file was written.

    Record time stands still between a run's end and its resume, so records of earlier tries come
    out later than they were, by the time the run was dead since.
    """
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    times = [row["time"] for line in lines[-5:] if (row := _row(line)) and "time" in row]
    return path.stat().st_mtime - (times[-1] if times else 0.0)
