"""Apache Kafka behind the ports of `pipeline.ports`, by confluent-kafka (librdkafka).

`options` says how each client is set up and why, `errors` what each error code means for the caller; `reader`, `writer` and
`transaction` are one client each, `log` joins them, `topics` looks after the topics themselves.
"""
