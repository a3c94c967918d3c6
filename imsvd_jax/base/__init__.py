"""What every room may use: errors, console, files, devices, hashing."""
