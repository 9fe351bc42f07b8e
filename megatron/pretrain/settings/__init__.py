"""From the command line to checked settings; nothing here needs a process group."""
