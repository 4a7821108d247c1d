"""The web page: it writes configuration files, starts verbs as processes, and reads their files."""
