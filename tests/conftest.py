"""One thread for every test, here and in the processes that tests start.

Tests run beside other work, and threads that wait for each other at every operation are slow there. It also gives a run
in a test and a run in a process of its own the same arithmetic.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("DDFAST_THREADS", "1")
