"""The command line: one file per command. Nothing here imports torch before the settings are known to be right."""
