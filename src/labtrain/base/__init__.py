"""The base of all other packages: errors, text for terminals, credentials, untrusted files. No torch."""
