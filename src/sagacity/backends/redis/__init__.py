"""The Redis side: the bus over Redis Streams, and an embedded server for development."""
