"""Real servers for the tests: from an URL, else from PATH, else from a wheel."""
