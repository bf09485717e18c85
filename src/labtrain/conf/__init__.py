"""The configuration that every experiment starts from: `pkg://labtrain.conf`."""
