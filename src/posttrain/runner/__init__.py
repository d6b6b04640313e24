"""From a configuration file to a run: what the command line and later the dashboard stand on."""
