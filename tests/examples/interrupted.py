"""A training run that is interrupted: `python -m tests.examples.interrupted HOW STEP FLAGS...`.

HOW is "killed", for a SIGKILL inside the save of that step, or "stopped", for a SIGTERM as soon as
that step has been handed to the devices.
"""

import os
import signal
import sys

from examples.mla import train
from examples.mla.checkpoint import Checkpoints
from examples.mla.recorder import Recorder

how, last_step = sys.argv[1], int(sys.argv[2])
save, record = Checkpoints.save, Recorder.step


def killed(checkpoints, step, *args, **kwargs):
    """From when it calls Orbax, looks at every call of a function whether the folder is there.

    Another process makes it, and cannot complete it without this one, which dies in between.
    """

    def look(*_):
        if any(name.startswith(f"{step}.") for name in os.listdir(checkpoints.folder)):
            os.kill(os.getpid(), signal.SIGKILL)

    if step == last_step:
        sys.setprofile(look)
    save(checkpoints, step, *args, **kwargs)


def stopped(recorder, step, numbers):
    record(recorder, step, numbers)
    if step == last_step:
        os.kill(os.getpid(), signal.SIGTERM)


if how == "killed":
    Checkpoints.save = killed
else:
    Recorder.step = stopped
sys.exit(train.main(sys.argv[3:]))
