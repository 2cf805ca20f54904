"""What SPIFFE prescribes between programs: bundle endpoints of other trust domains, and the Workload API."""
