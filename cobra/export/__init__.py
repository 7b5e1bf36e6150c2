"""Adapters as other programs read them. Everything here is imported when it is used."""
