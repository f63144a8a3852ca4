"""What every kernel needs to be launched: the device, the namespace, tuned configurations, machine code to read."""
