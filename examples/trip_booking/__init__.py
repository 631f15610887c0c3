"""Trip booking: a process manager with loops, started explicitly, that cancels what it booked."""
