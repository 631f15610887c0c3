"""The Redis side: the bus over Redis Streams, and an embedded server for development."""

from sagacity.backends.redis.bus import RedisBus
from sagacity.backends.redis.subscription import RedisSubscription

__all__ = ["RedisBus", "RedisSubscription"]
