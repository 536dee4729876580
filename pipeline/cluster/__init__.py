"""The roles of processes that share a log on Kafka: each joins the parts that it needs."""

from pipeline.cluster.server import ClusterServer
from pipeline.cluster.worker import ClusterWorker

__all__ = ["ClusterServer", "ClusterWorker"]
