"""Progress of a restore, on standard error."""

from __future__ import annotations

import threading

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.cli import console
from pipeline.worker.restore import RestoreProgress


class RestoreBars:
    """A bar for each partition that is restored: entries, rate, time left; a line when it is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def __call__(self, progress: RestoreProgress) -> None:
        """Show the progress. Safe from any thread."""
        with self._lock:
            if progress.done:
                self._finish(progress)
            elif progress.entries:
                self._show(progress)

    def _show(self, progress: RestoreProgress) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("restore {task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} entries, {task.fields[rate]:,.0f}/s"),
                TimeRemainingColumn(),
                console=console.err,
                disable=not console.err.is_terminal,
            )
            self._progress.start()
        task = self._tasks.get(progress.partition)
        if task is None:
            task = self._tasks[progress.partition] = self._progress.add_task(str(progress.partition), rate=0.0)
        self._progress.update(
            task,
            completed=progress.entries,
            total=progress.entries + progress.remaining,
            rate=progress.entries_per_s,
        )

    def _finish(self, progress: RestoreProgress) -> None:
        task = self._tasks.pop(progress.partition, None)
        if self._progress is not None and task is not None:
            self._progress.update(task, completed=progress.entries, total=progress.entries)
            if not self._tasks:  # later restores have new bars
                self._stop()
        if progress.entries:
            rate = f"{progress.entries_per_s:,.0f}/s"
            console.err.print(
                f"restored partition {progress.partition}: {progress.entries:,} entries in {progress.seconds:.1f} s, {rate}"
            )

    def close(self) -> None:
        """Remove the bars. A later restore has a new one."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        self._tasks.clear()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
