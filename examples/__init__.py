"""Programs built on Sagacity; the tests run every one of them."""
