"""The two commands: `saga-worker` runs a service, `saga` is what an operator types."""
