"""Editors that are not closed-form. Their updates leave through the same door."""
