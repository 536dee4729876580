"""Apache Kafka behind the ports of `pipeline.ports`, by confluent-kafka (librdkafka).

`options` sets up each client and says why, `errors` tells what each error code means for the caller. `reader`, `writer` and
`transaction` are one client each, `log` joins them, `topics` creates and changes topics, `checks` verifies them.
"""
