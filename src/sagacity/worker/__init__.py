"""The worker: reads messages and the clock, lets the core decide, commits, publishes, acknowledges."""
