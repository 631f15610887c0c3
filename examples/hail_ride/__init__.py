"""Hail a ride: one flow told to one caller, to the whole application, and over the bus."""
