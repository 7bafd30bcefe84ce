"""The real engine on a simulated device, in virtual time."""
