"""The demo: from arcade games to generated videos."""
