"""Questions about finished runs: verify, gate, ls, report, crate, sign."""
