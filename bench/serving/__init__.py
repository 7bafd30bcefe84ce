"""The load generator, and throughput, latency and quality of the server and its engine."""
