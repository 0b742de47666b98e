"""The transformer: who calls whom."""
