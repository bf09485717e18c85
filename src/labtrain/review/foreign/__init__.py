"""Verify runs that came from elsewhere: out of a git repository, or a bundle that `labtrain bundle` made."""
