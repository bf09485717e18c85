"""Work on finished runs: verify, gate, ls, report, crate, sign."""
