"""Campaign publishing: a linear saga over an entity that records events."""
