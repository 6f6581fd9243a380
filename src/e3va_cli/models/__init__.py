"""The network: a frozen backbone under a tuning method, a neck and a head."""
