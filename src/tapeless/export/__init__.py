"""Models as C programs for microcontrollers, this machine and the browser: `tapeless export`."""
