"""The hacking gym: small worlds in which a tiny policy can gain reward without gaining worth, to measure detectors with."""
