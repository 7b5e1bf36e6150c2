"""Figures of a run. Everything here needs matplotlib and is imported when it is used."""
