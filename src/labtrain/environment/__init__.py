"""The locked environment: `labtrain lock` and `labtrain doctor`. No torch."""
