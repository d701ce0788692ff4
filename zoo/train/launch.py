"""`accelerate launch` that may be asked to stop: it is not told itself, the processes that it started are.

torch's launcher passes SIGTERM and SIGINT on to its workers, which save and end well, and then ends with an error, as
if the run had failed. Here workers get the signal alone, so their status is the launcher's. Where one fails, it has
said why, and a line of torch's launcher says which it was; the launcher's own traceback is left out.
"""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from zoo.train.stop import handling_stops

# Without an import of the zoo, which a launcher has no use for.
_LAUNCHER = """
import sys
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    main()
except ChildFailedError:
    sys.exit(1)
"""


def launch(arguments: Sequence[str]) -> int:
    """Run `accelerate launch`; SIGTERM, SIGINT and SIGHUP go to the processes that train.

    Args:
        arguments: of `accelerate launch`.

    Returns:
        Its exit status: 0 where all processes ended well, finished or stopped.
    """
    command = [sys.executable, "-c", _LAUNCHER, *arguments]
    launcher = subprocess.Popen(command, start_new_session=True)  # out of reach of the terminal's Ctrl-C

    def pass_on(number: int, frame: Any) -> None:
        try:
            process = psutil.Process(launcher.pid)
            for receiver in process.children() or [process]:  # before it has any there is nothing to save
                receiver.send_signal(number)
        except psutil.NoSuchProcess:  # it ended by itself
            pass

    with handling_stops(pass_on):
        return launcher.wait()
