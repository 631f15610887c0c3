"""The worker: reads messages and the clock, lets the core decide, commits, publishes, acknowledges."""

import logging

# A library stays silent until the program says where logs go (`sagacity.worker.logs.configure`).
logging.getLogger("sagacity").addHandler(logging.NullHandler())
