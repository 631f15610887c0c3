"""The servers that a service runs on: memory, Redis and SQL. They do not know each other."""
