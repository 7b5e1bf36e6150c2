"""COBRA inside other people's training loops."""
