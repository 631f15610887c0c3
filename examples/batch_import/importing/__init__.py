"""Importing: batches of users and orders, and what they are now. It knows nobody who listens."""
