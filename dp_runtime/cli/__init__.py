"""The command line: flags, input and output files, commands."""
