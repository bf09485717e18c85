"""What everything else stands on: errors, text for terminals, credentials, files of other people. No torch."""
