"""Probes of an endpoint, by what they ask about; each registers itself with `conformance`."""
