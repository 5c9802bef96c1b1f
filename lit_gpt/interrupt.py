"""A polite end: a run that is asked to stop finishes its step, saves, and says how to go on."""

import signal


class Interrupt:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can finish the step, save, and end."""

    def __init__(self) -> None:
        self.requested = False
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends it at once
