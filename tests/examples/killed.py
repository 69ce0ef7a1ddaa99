"""A training run that kills itself: `python -m tests.examples.killed PLACE STEP MOMENT FLAGS...`.

PLACE "save": inside the save of STEP, at the MOMENT-th of the calls that Python makes there, in
whichever thread, at the latest when the save has written everything and is about to return.
PLACE "training": MOMENT seconds after STEP was handed to the devices, wherever it is then.
"""

import itertools
import os
import signal
import sys
import threading

from examples.mla import train
from examples.mla.checkpoint import Checkpoints
from examples.mla.recorder import Recorder

place, last_step, moment = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
save, record = Checkpoints.save, Recorder.step


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_save(checkpoints, step, *args, **kwargs):
    calls = itertools.count()

    def count(_frame, event, _arg):
        if event in ("call", "c_call") and next(calls) >= moment:
            kill()

    if step == last_step:
        threading.setprofile(count)  # of threads that start from here on
        sys.setprofile(count)
    save(checkpoints, step, *args, **kwargs)
    if step == last_step:
        kill()


def killed_in_training(recorder, step, numbers):
    record(recorder, step, numbers)
    if step == last_step:
        threading.Timer(moment, kill).start()


if place == "save":
    Checkpoints.save = killed_in_save
else:
    Recorder.step = killed_in_training
sys.exit(train.main(sys.argv[4:]))
