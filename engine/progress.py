"""What a run is doing, on the terminal."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

STAGES = {
    "load": "Loading the model",
    "preprocess": "Preparing the picture",
    "encode_text": "Reading the instruction",
    "encode_image": "Encoding the picture",
    "prepare": "Preparing the steps",
    "denoise": "Editing",
    "decode": "Decoding the result",
    "postprocess": "Finishing",
    "save": "Saving",
}


class Progress:
    """A line that names the stage and, while denoising, counts steps and guesses the time left.

    A context manager; the line vanishes at its end. Without a console nothing is shown. Ctrl-C ends the run at the next
    stage or step at the latest: libraries, while they are imported, and finalizers now and then swallow the exception.
    """

    def __init__(self, console: "Console | None") -> None:
        self._bar = _bar(console) if console else None
        self._task = self._bar.add_task("Starting", total=None, count="") if self._bar else None
        self._interrupted = self._listening = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        self._listening = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._listening:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._bar:
            self._bar.stop()

    def _interrupt(self, _: int, __: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _go_on(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    def stage(self, name: str) -> None:
        """The stage `name` begins: one of STAGES, or any other word, shown as it is."""
        self._go_on()
        if self._bar and self._task is not None:
            self._bar.reset(self._task, total=None, description=STAGES.get(name, name), count="")

    def step(self, step: int, steps: int) -> None:
        """Denoise step `step` of `steps` is done (counted from 1)."""
        self._go_on()
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=steps, completed=step, count=f"{step}/{steps}, ETA")


def _bar(console: "Console") -> "Bar":
    from rich import progress

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[count]}"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def terminal(quiet: bool) -> "Console | None":
    """A console on stderr if a person is watching it, else None: pipes and log files get no moving lines."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        return None
    from rich.console import Console

    return Console(stderr=True)
