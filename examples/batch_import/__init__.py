"""The example program: a batch of users and orders becomes accounts in remote systems."""
