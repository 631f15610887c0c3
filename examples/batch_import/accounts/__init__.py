"""Which orders hold which accounts in the remote systems."""
