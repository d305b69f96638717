"""The Ray side: a driver actor and replica actors that host whatever they are given."""
