"""`torchrun -m siglip2 train ...`."""

import atexit
import os
import sys

from .cli import main

if __name__ == "__main__":
    status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # After FSDP2 over gloo the interpreter's own end aborts now and then (a thread left
        # joinable, torch 2.13), and torchrun would call a finished run failed.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
