"""What a monitoring system asks of a host: numbers of the daemon and its store, in the text format of Prometheus.

documents   `status` and `stats` as the daemon and the store answer them   sectool.metrics.collect
families    named numbers made of them                                      sectool.metrics.families
text        as Prometheus reads it                                          sectool.metrics.exposition
endpoint    over HTTP, to whoever asks                                      sectool.metrics.endpoint
"""
