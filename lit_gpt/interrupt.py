"""A polite end: a run that is asked to stop finishes its step, saves, and says how to go on."""

import os
import signal


class Interrupt:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can finish the step, save, and end.

    Args:
        aloud: say so at once, as one rank should: a step may take long.
    """

    def __init__(self, aloud: bool = True) -> None:
        self.requested, self.aloud = False, aloud
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: object) -> None:
        if not self.requested:
            self._say("stopping: this step is finished and saved first; one more Ctrl-C ends at once, without saving")
        self.requested = True
        signal.signal(signal.SIGINT, self._end)

    def _end(self, signum: int, _frame: object) -> None:
        self._say("interrupted: nothing was saved since the last checkpoint")
        # No exception: threads that save would make a crash of it. What they leave half written has another name.
        os._exit(130)  # what a shell reports for Ctrl-C

    def _say(self, line: str) -> None:
        if self.aloud:
            os.write(2, f"{line}\n".encode())  # print may have been interrupted in the middle of a line
