"""The hacking gym: small worlds in which a tiny policy can gain reward without gaining worth, for measuring detectors (docs/integrity.md)."""
