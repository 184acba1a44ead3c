"""What stands on the core and which the core does not need: import the module you want."""
